"""Pages against a slow model of who owns what: no page with two owners that didn't agree to share it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkv.errors import RLKVError
from rlkv.paged.pool import PagePool
from rlkv.paged.tables import PageTables, Rows
from rlkv.window import Window

LAYERS, HEADS, SLOTS, LENGTH, PAGE = 2, 3, 5, 60, 4
WINDOW = Window(2, 5)


class SlowModel:
    """For each slot and row, the identity of every token's cell; equal identities mean shared memory."""

    def __init__(self) -> None:
        self.length: dict[int, int] = {}
        self.full: dict[int, np.ndarray] = {}

    def columns(self, slot: int, row: int) -> int:
        tokens = self.length[slot]
        if not self.full[slot].reshape(-1)[row]:
            tokens = min(tokens, WINDOW.sink + WINDOW.recent)
        return -(-tokens // PAGE)


def make_tables(pages: int) -> PageTables:
    return PageTables(
        LAYERS,
        HEADS,
        slots=SLOTS,
        max_length=LENGTH,
        page_size=PAGE,
        pool=PagePool(pages),
        window=WINDOW,
        device=torch.device("cpu"),
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pages_have_one_owner_or_agreed_ones(data: st.DataObject) -> None:
    tables, slow = make_tables(400), SlowModel()
    shared: dict[
        tuple[int, int, int], set[int]
    ] = {}  # (slot, row, column) -> slots that may hold the same page
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["open", "grow", "fork", "release", "move"]))
        free = [slot for slot in range(SLOTS) if slot not in slow.length]
        if action == "open" and free:
            slot = free[0]
            full = np.array(
                data.draw(st.lists(st.booleans(), min_size=LAYERS * HEADS, max_size=LAYERS * HEADS))
            )
            slow.full[slot], slow.length[slot] = full.reshape(LAYERS, HEADS), 0
            tables.open(slot, Rows.of(slow.full[slot]))
        elif action == "grow" and slow.length:
            slot = data.draw(st.sampled_from(sorted(slow.length)))
            length = data.draw(st.integers(slow.length[slot], LENGTH))
            more, before = tables.need_more(slot, length), tables.pool.free
            tables.grow(slot, length)
            assert before - tables.pool.free == more
            slow.length[slot] = length
        elif action == "fork" and slow.length and free:
            source, target = data.draw(st.sampled_from(sorted(slow.length))), free[-1]
            slow.full[target], slow.length[target] = slow.full[source], slow.length[source]
            rows, length, before = Rows.of(slow.full[source]), slow.length[source], tables.pool.free
            tables.open(target, rows)
            old, new = tables.fork(source, target, length)
            assert before - tables.pool.free == tables.need(rows, length) - tables.shared(rows, length)
            assert len(old) == len(new) == before - tables.pool.free and not set(old) & set(new)
            for row in rows.full:
                for column in range(length // PAGE):
                    owners = shared.get((source, row, column), {source}) | {target}
                    for owner in owners:
                        shared[owner, row, column] = owners
        elif action == "release" and slow.length:
            slot = data.draw(st.sampled_from(sorted(slow.length)))
            tables.release(slot)
            del slow.length[slot], slow.full[slot]
            for key in [key for key in shared if key[0] == slot]:
                shared.pop(key).discard(slot)
        elif action == "move" and slow.length and free:
            source, target = data.draw(st.sampled_from(sorted(slow.length))), free[0]
            tables.move([(source, target)])
            slow.length[target], slow.full[target] = slow.length.pop(source), slow.full.pop(source)
            for key in [key for key in shared if key[0] == source]:
                owners = shared.pop(key)
                owners.discard(source)
                owners.add(target)
                shared[target, key[1], key[2]] = owners
        tables.flush()
        check(tables, slow, shared)
    for slot in list(slow.length):
        tables.release(slot)
    assert tables.pool.used == 0 and tables.pool.free == 399 and not tables.pool.owners.any()
    assert len(set(tables.pool.take(399).tolist())) == 399  # every page is there again, once


def check(tables: PageTables, slow: SlowModel, shared: dict[tuple[int, int, int], set[int]]) -> None:
    owners: dict[int, list[tuple[int, int, int]]] = {}
    for slot in slow.length:
        for row in range(LAYERS * HEADS):
            for column in range(slow.columns(slot, row)):
                page = int(tables.table[row // HEADS, slot, row % HEADS, column])
                owners.setdefault(page, []).append((slot, row, column))
    assert 0 not in owners
    for places in owners.values():
        slots = {slot for slot, _, _ in places}
        assert len(slots) == len(places)  # never twice in one request
        assert len({place[1:] for place in places}) == 1  # only for the same tokens of the same row
        if len(places) > 1:
            assert all(slots <= shared[place] for place in places)
    counted = Counter({page: len(places) for page, places in owners.items()})
    assert counted == Counter(
        {page: count for page, count in enumerate(tables.pool.owners.tolist()) if count}
    )


def test_an_empty_pool_says_so() -> None:
    pool = PagePool(5)
    pages = pool.take(4)
    with pytest.raises(RLKVError, match="1 pages asked for, 0 are free"):
        pool.take(1)
    pool.share(pages[:2])
    pool.release(pages)
    assert pool.used == 2
    pool.release(pages[:2])
    assert pool.free == 4
    with pytest.raises(RLKVError):
        PagePool(1)
