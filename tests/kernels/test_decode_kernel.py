"""The head-split paged decode kernel, in Triton's interpreter or on the GPU, against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_kit import DEVICE, attention, make_paged

from rlkv.errors import RLKVError
from rlkv.window import Window

pytest.importorskip("triton")
from rlkv.kernels.decode import PagedDecoder, Tuning, held_counts, store  # noqa: E402

WINDOW = Window(10, 40)


def make_decoder(
    requests: int, kv_heads: int, group: int, dim: int, programs: int = 5, block: int = 16, least: int = 1
) -> PagedDecoder:
    return PagedDecoder(
        rows=requests * kv_heads,
        query_heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=dim,
        device=DEVICE,
        programs=programs,
        tuning=Tuning(block=block, least_blocks=least),
    )


@pytest.mark.parametrize(
    "page, block, programs, least, group, dim",
    [
        (16, 16, 5, 1, 2, 16),
        (16, 32, 7, 1, 1, 32),
        (32, 16, 3, 2, 4, 64),
        (64, 32, 40, 1, 3, 16),
        (16, 16, 30, 1, 8, 16),
        (32, 32, 4, 3, 1, 128),
    ],
)
def test_rows_of_any_length_match_the_definition(
    page: int, block: int, programs: int, least: int, group: int, dim: int
) -> None:
    generator = torch.Generator().manual_seed(page + block + group)
    counts = torch.randint(1, 130, (3, 3), generator=generator)
    counts[0, 1], counts[1, 2], counts[2, 0] = 0, 1, block
    paged = make_paged(counts, dim, page, torch.float32)
    query = torch.randn(3, 3 * group, dim, generator=generator).to(DEVICE)
    decoder = make_decoder(3, 3, group, dim, programs, block, least)
    plan = decoder.plan(paged.counts[None])
    wanted = attention(query, paged, 0.3, None, None)
    for _ in range(2):  # the second call finds what the first one left in the scratch memory
        found = decoder.attend(query, paged.keys, paged.values, paged.table, plan, 0, 0.3)
        torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "page, block, programs, group", [(16, 16, 6, 2), (32, 16, 30, 2), (16, 32, 1, 3), (16, 16, 9, 9)]
)
def test_soft_gates_mix_both_branches(page: int, block: int, programs: int, group: int) -> None:
    generator = torch.Generator().manual_seed(page)
    counts = torch.tensor([[149], [50], [51], [7], [89]]).expand(5, 3)
    paged = make_paged(counts, 16, page, torch.float32)
    query = torch.randn(5, 3 * group, 16, generator=generator).to(DEVICE)
    gates = torch.rand(5, 2, 3, generator=generator)
    gates[0, 1, 0], gates[0, 1, 1], gates[4, 1, 2] = 0, 1, 0
    decoder = make_decoder(5, 3, group, 16, programs, block)
    plan = decoder.plan(paged.counts.expand(2, -1, -1), gates.to(DEVICE), WINDOW)
    found = decoder.attend(query, paged.keys, paged.values, paged.table, plan, 1, 0.25)
    wanted = attention(query, paged, 0.25, gates[:, 1], WINDOW)
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_broken_row_spoils_no_other() -> None:
    """Requests share programs: NaN in one's keys must stay with it."""
    counts = torch.tensor([[70, 9], [40, 130], [5, 64]])
    paged = make_paged(counts, 16, 16, torch.float32)
    query = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    wanted = attention(query, paged, 0.25, None, None)
    for pool in (paged.keys, paged.values):
        pool[paged.table[1, 0, :3].long()] = torch.nan
    decoder = make_decoder(3, 2, 2, 16, programs=4)
    plan = decoder.plan(paged.counts[None])
    found = decoder.attend(query, paged.keys, paged.values, paged.table, plan, 0, 0.25).cpu().double()
    assert found[1, :2].isnan().all()
    found[1, :2] = wanted[1, :2]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_closed_gate_reads_its_window_alone() -> None:
    paged = make_paged(torch.tensor([[200, 200]]), 16, 16, torch.float32)
    query = torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    gates = torch.tensor([[[0.0, 0.5]]])
    wanted = attention(query, paged, 0.25, gates[:, 0], WINDOW)
    for index in range(1, 200 // 16 - 3):  # pages between the sink (page 0) and the last 40 tokens
        for pool in (paged.keys, paged.values):
            pool[paged.table[0, 0, index].long()] = torch.nan
    decoder = make_decoder(1, 2, 1, 16)
    plan = decoder.plan(paged.counts[None], gates.to(DEVICE), WINDOW)
    found = decoder.attend(query, paged.keys, paged.values, paged.table, plan, 0, 0.25)
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("full", [[True, False], [True, True], [False, False]])
def test_stored_tokens_are_attended_by_the_window(full: list[bool]) -> None:
    """A request grows token by token: full heads keep every key, local heads what the window shows."""
    window, length, page, dim = Window(3, 14), 45, 16, 16
    mask = torch.tensor(full)
    paged = make_paged(torch.tensor([[64, 64], [64, 64]]), dim, page, torch.float32)
    for pool in (paged.keys, paged.values):
        pool.fill_(torch.nan)
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(2, length, 2, 2, dim, generator=generator)  # key or value, token, request, head
    query = torch.randn(2, 4, dim, generator=generator)
    decoder = make_decoder(2, 2, 2, dim)
    for position in range(length):
        positions = torch.tensor([position, position - 20], device=DEVICE)  # one comes later
        key, value = states[:, position].to(DEVICE)
        store(key, value, paged.keys, paged.values, paged.table, positions, mask.to(DEVICE), window)
    counts = held_counts(torch.tensor([length, length - 20], device=DEVICE), mask.to(DEVICE)[None], window)
    assert counts[0, 0].tolist() == [length if one else 17 for one in full]
    plan = decoder.plan(counts)
    found = decoder.attend(query.to(DEVICE), paged.keys, paged.values, paged.table, plan, 0, 0.25).cpu()
    for request, first in ((0, 0), (1, 20)):
        at = torch.arange(length - first)
        for head, is_full in enumerate(full):
            seen = (at >= 0) if is_full else window.sees(at[-1], at)
            key, value = states[:, first:, request, head][:, seen]
            rows = slice(2 * head, 2 * head + 2)
            wanted = (query[request, rows] @ key.T * 0.25).softmax(-1) @ value
            torch.testing.assert_close(found[request, rows], wanted, rtol=1e-5, atol=1e-5)


def test_scales_undo_what_storing_divided_by() -> None:
    scales = torch.tensor([[2.0, 0.5], [4.0, 0.25]])
    paged = make_paged(torch.tensor([[40, 33]]), 16, 16, torch.float32)
    query = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    wanted = attention(query, paged, 0.25, None, None)
    for head, count in enumerate((40, 33)):
        pages = paged.table[0, head, : -(-count // 16)].long()
        paged.keys[pages] /= scales[0, head].item()
        paged.values[pages] /= scales[1, head].item()
    decoder = make_decoder(1, 2, 2, 16)
    plan = decoder.plan(paged.counts[None])
    args: tuple[Any, ...] = (paged.keys, paged.values, paged.table)
    key, value = torch.randn(2, 1, 2, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = decoder.attend(query, *args, plan, 0, 0.25, scales=scales.to(DEVICE))
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-5, atol=1e-5)
    store(key, value, *args, torch.zeros(1, dtype=torch.int64, device=DEVICE),
          torch.ones(2, dtype=torch.bool, device=DEVICE), WINDOW, scales.to(DEVICE))  # fmt: skip
    first = paged.keys[paged.table[0, :, 0].long(), 0].cpu()
    torch.testing.assert_close(first, key[0].cpu() / scales[0][:, None])


@pytest.mark.parametrize("least", [1, 3])
def test_work_is_shared_evenly_whatever_the_lengths(least: int) -> None:
    counts = torch.tensor([[[3000, 5], [700, 64]], [[1, 0], [1, 1]]], device=DEVICE)
    decoder = make_decoder(2, 2, 1, 16, programs=6, block=64, least=least)
    plan = decoder.plan(counts)
    for layer, rows in enumerate([[47, 1, 11, 1], [1, 1, 1, 1]]):
        held = counts[layer].flatten().tolist()
        blocks = [(row, block) for row, number in enumerate(rows) for block in range(number)]
        sharers = max(1, min(6, len(blocks) // least))
        shares = plan.shares[layer].tolist()
        assert [share[2] for share in shares[sharers:]] == [0] * (6 - sharers)
        taken, readers = [], [set[int]() for _ in rows]
        for program, (row, block, number, count, next_count, *_) in enumerate(shares[:sharers]):
            assert len(blocks) // sharers <= number <= -(-len(blocks) // sharers)
            assert (row, block) == blocks[len(taken)]
            assert [count, next_count] == [held[row], held[min(row + 1, 3)]]
            taken += blocks[len(taken) : len(taken) + number]
            for read, _ in taken[-number:]:
                readers[read].add(program)
        assert taken == blocks
        for program, (row, _, number, *_, begins, first, last) in enumerate(shares):
            last_row = max((read for read in range(4) if program in readers[read]), default=row)
            assert first == (len(readers[row]) if number and len(readers[row]) > 1 else 0)
            assert last == (len(readers[last_row]) if last_row > row and len(readers[last_row]) > 1 else 0)
            assert not first or begins == min(readers[row])


def test_what_does_not_fit_is_refused() -> None:
    paged = make_paged(torch.tensor([[40, 33]]), 16, 24, torch.float32)
    query = torch.zeros(1, 4, 16, device=DEVICE)
    decoder = make_decoder(1, 2, 2, 16, block=16)
    plan = decoder.plan(paged.counts[None])
    with pytest.raises(RLKVError, match="24 tokens and blocks of 16"):
        decoder.attend(query, paged.keys, paged.values, paged.table, plan, 0, 0.25)
    with pytest.raises(RLKVError, match="head dims"):
        make_decoder(1, 2, 2, 24)
    with pytest.raises(RLKVError, match="evenly"):
        PagedDecoder(rows=2, query_heads=5, kv_heads=2, head_dim=16, device=DEVICE, programs=1)
    pool, apart = torch.zeros(4, 16, 16, device=DEVICE), torch.zeros(1, 2, 8, device=DEVICE).int()[:, :, ::2]
    with pytest.raises(RLKVError, match="follow each other"):
        decoder.attend(query, pool, pool, apart, plan, 0, 0.25)
    with pytest.raises(RLKVError, match="1 to 2 rows, got 4"):
        decoder.plan(paged.counts.expand(1, 2, -1))
    with pytest.raises(RLKVError, match="1 to 2 rows, got 0"):
        decoder.plan(torch.zeros(1, 0, 2, dtype=torch.int32, device=DEVICE))
    with pytest.raises(RLKVError, match="window"):
        decoder.plan(paged.counts[None], torch.ones(1, 1, 2))
