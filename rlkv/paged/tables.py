"""Pages of each request: allocated and grown with its length, shared by equal prompts, freed at its end.

A request has one row a (layer, KV head). All its full rows hold the same number of tokens, and so do all its
local rows (a ring of sink + recent), so pages come and go by columns: one page a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from rlkv.paged.pool import PagePool
from rlkv.window import Window


@dataclass(frozen=True)
class Rows:
    """Full and local rows of a request: int64 arrays of layer * kv_heads + head."""

    full: np.ndarray
    local: np.ndarray

    @classmethod
    def of(cls, full: np.ndarray) -> Rows:
        """``full`` bool [layers, kv_heads]."""
        flat = full.reshape(-1)
        return cls(np.flatnonzero(flat), np.flatnonzero(~flat))


@dataclass
class Holding:
    """Columns of pages that one request holds."""

    rows: Rows
    full: list[np.ndarray] = field(default_factory=list)
    local: list[np.ndarray] = field(default_factory=list)

    def pages(self) -> np.ndarray:
        return np.concatenate([np.empty(0, np.int32), *self.full, *self.local])


class PageTables:
    """Holdings of all slots, mirrored in ``table`` int32 [layers, slots, kv_heads, most pages] on the device.

    ``flush`` brings changes to the device. Entries beyond what a row holds mean nothing.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        *,
        slots: int,
        max_length: int,
        page_size: int,
        pool: PagePool,
        window: Window,
        device: torch.device,
    ) -> None:
        self.pool, self.window, self.page_size = pool, window, page_size
        most = -(-max_length // page_size)
        self.table = torch.zeros(layers, slots, kv_heads, most, dtype=torch.int32, device=device)
        self.held: dict[int, Holding] = {}
        self._shape = (slots, kv_heads, most)
        self._places: list[np.ndarray] = []
        self._values: list[np.ndarray] = []

    def need(self, rows: Rows, length: int) -> int:
        """Pages of a request of ``length`` tokens that shares none."""
        full, local = self._columns(length)
        return len(rows.full) * full + len(rows.local) * local

    def need_more(self, slot: int, length: int) -> int:
        """Further pages that the request in ``slot`` needs to hold ``length`` tokens."""
        held = self.held[slot]
        full, local = self._columns(length)
        more_full, more_local = max(full - len(held.full), 0), max(local - len(held.local), 0)
        return len(held.rows.full) * more_full + len(held.rows.local) * more_local

    def shared(self, rows: Rows, length: int) -> int:
        """Pages that requests of the same first ``length`` tokens can share: full pages of full rows."""
        return len(rows.full) * (length // self.page_size)

    def open(self, slot: int, rows: Rows) -> None:
        """Start a request in a slot; it holds nothing yet."""
        assert slot not in self.held
        self.held[slot] = Holding(rows)

    def grow(self, slot: int, length: int) -> None:
        """Make room for ``length`` tokens."""
        held = self.held[slot]
        full, local = self._columns(length)
        for rows, columns, wanted in (
            (held.rows.full, held.full, full),
            (held.rows.local, held.local, local),
        ):
            while len(columns) < wanted:
                columns.append(self.pool.take(len(rows)))
                self._write(slot, rows, len(columns) - 1, columns[-1])

    def fork(self, source: int, target: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Let the opened slot ``target`` hold the ``length`` tokens that ``source`` holds.

        Full pages of full rows are shared; pages that will be written to are its own: returns the
        pages (from, to) whose contents are to be copied.
        """
        old, new = self.held[source], self.held[target]
        whole = length // self.page_size
        for index, pages in enumerate(old.full[:whole]):
            self.pool.share(pages)
            new.full.append(pages)
            self._write(target, new.rows.full, index, pages)
        self.grow(target, length)
        full, local = self._columns(length)
        nothing = [np.empty(0, np.int32)]
        return (
            np.concatenate(nothing + old.full[whole:full] + old.local[:local]),
            np.concatenate(nothing + new.full[whole:full] + new.local[:local]),
        )

    def release(self, slot: int) -> None:
        """Give back what a slot holds."""
        held = self.held.pop(slot)
        for pages in (*held.full, *held.local):
            self.pool.release(pages)

    def move(self, moves: list[tuple[int, int]]) -> None:
        """(from, to) slots; targets are free."""
        self.flush()
        source, target = torch.tensor(moves, device=self.table.device).unbind(1)
        self.table[:, target] = self.table[:, source]
        for old, new in moves:
            self.held[new] = self.held.pop(old)

    def clear(self) -> None:
        """Nobody holds anything, whatever an error left half done; nothing is left to flush."""
        self.held.clear()
        self._places.clear()
        self._values.clear()
        self.pool.clear()

    def flush(self) -> None:
        """Bring the device's table up to date."""
        if self._places:
            places, values = np.concatenate(self._places), np.concatenate(self._values)
            device = self.table.device
            self.table.view(-1)[torch.from_numpy(places).to(device)] = torch.from_numpy(values).to(device)
            self._places.clear()
            self._values.clear()

    def _columns(self, length: int) -> tuple[int, int]:
        return -(-length // self.page_size), -(-self.window.held(length) // self.page_size)

    def _write(self, slot: int, rows: np.ndarray, column: int, pages: np.ndarray) -> None:
        slots, kv_heads, most = self._shape
        layer, head = np.divmod(rows, kv_heads)
        self._places.append(((layer * slots + slot) * kv_heads + head) * most + column)
        self._values.append(pages)
