"""Where each request's tokens lie, and what one forward pass adds: worked out once, read by every layer.

A *column* is an index into the padded batch, the same for every request; a token's *position* is its column
less the request's left padding.
"""

from __future__ import annotations

from functools import cached_property
from itertools import accumulate

import torch

from rlkv.window import Window


class Rows:
    """The flat buffer of the full heads: one region for each request, of whole blocks of columns.

    Blocks that are wholly left padding have no place in it. All regions end at the same column, ``end``, so
    that they grow in the same step.
    """

    def __init__(self, first: list[int], stop: int, block: int) -> None:
        self.first = first  # left padding, in columns
        self.block = block
        self.end = -(-stop // block) * block
        self.base = [column // block * block for column in first]  # first stored column
        *self.offset, self.total = accumulate((self.end - base for base in self.base), initial=0)
        self.dense = len(set(self.base)) == 1  # then the buffer is [batch, capacity] without copying
        self._on: dict[torch.device, RowTensors] = {}

    def place(self, row: int, start: int, stop: int) -> slice:
        """Where columns [start, stop) of a request lie."""
        return slice(*(self.offset[row] + max(column - self.base[row], 0) for column in (start, stop)))

    def on(self, device: torch.device) -> RowTensors:
        if device not in self._on:
            self._on[device] = RowTensors(self, device)
        return self._on[device]


class RowTensors:
    """The same as tensors, int64."""

    def __init__(self, rows: Rows, device: torch.device) -> None:
        blocks = [(rows.end - base) // rows.block for base in rows.base]
        self.first = torch.tensor(rows.first, device=device)  # [B]
        self.origin = torch.tensor(rows.offset, device=device) - torch.tensor(rows.base, device=device)
        owner = torch.arange(len(blocks)).repeat_interleave(torch.tensor(blocks))
        self.owner = owner.to(device)  # [blocks]: the request of each block
        places = torch.arange(rows.total, device=device).view(-1, rows.block)
        self.column = places - self.origin[self.owner, None]  # [blocks, block]
        self.padding = self.column < self.first[self.owner, None]  # bool


class Forward:
    """One forward pass on one device: ``count`` new columns from ``start`` on."""

    def __init__(self, rows: Rows, start: int, count: int, window: Window, device: torch.device) -> None:
        self.rows, self.start, self.count, self.window = rows, start, count, window
        self.stop = start + count
        self.tensors = rows.on(device)
        self.decodes = count == 1 and max(rows.first) < self.stop  # one real token in every row

    def positions(self, start: int, stop: int) -> torch.Tensor:
        """Positions of columns [start, stop): [B, stop - start]; negative for padding."""
        first = self.tensors.first
        return torch.arange(start, stop, device=first.device) - first[:, None]

    def held(self, stop: int) -> torch.Tensor:
        """Positions in a local head's ring after the columns below ``stop``: [B, W], -1 for an empty slot."""
        return self.window.held_positions(stop - 1 - self.tensors.first[:, None])

    @cached_property
    def slot(self) -> torch.Tensor:
        """Ring slot of the newest token: [B]."""
        return self.window.slot(self.stop - 1 - self.tensors.first)

    @cached_property
    def ring_visible(self) -> torch.Tensor | None:
        """Bool [B, 1, 1, W]: the slots in use after this forward; None when that is all of them."""
        if self.stop - max(self.rows.first) >= self.window.size:
            return None
        return (self.held(self.stop) >= 0)[:, None, None]

    @cached_property
    def place(self) -> torch.Tensor:
        """Place of the newest token in the flat buffer: [B]."""
        return self.tensors.origin + (self.stop - 1)

    @cached_property
    def dense_visible(self) -> torch.Tensor | None:
        """Bool [1, B, 1, columns from the least padding on]; None when all rows have the same padding."""
        low = min(self.rows.first)
        if low == max(self.rows.first):
            return None
        return (self.positions(low, self.stop) >= 0)[None, :, None]

    @cached_property
    def blocks_hidden(self) -> torch.Tensor:
        """Bool [blocks, 1, block]: places of the flat buffer that hold no token."""
        return (self.tensors.padding | (self.tensors.column >= self.stop))[:, None]
