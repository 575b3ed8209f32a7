"""Which request holds which slot, and which slots attend together: plain bookkeeping, no tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from rlkv.slots import Span


@dataclass(frozen=True)
class Pace:
    """What pays on a device."""

    every: int  # steps between looks at which requests have finished: a look waits for the device
    round_columns: int  # columns attended over are a multiple of this
    groups: int  # spans of slots of like length that attend separately
    refill: int  # free slots that are worth a prompt pass
    prompt_tokens: int  # in one prompt pass, padding included
    power_of_two_rows: bool  # few different shapes of step, for CUDA graphs

    @classmethod
    def on_cpu(cls) -> Pace:
        return cls(1, round_columns=16, groups=4, refill=1, prompt_tokens=2048, power_of_two_rows=False)

    @classmethod
    def on_cuda(cls, slots: int, graphs: bool) -> Pace:
        refill = max(1, slots // 16)  # a prompt pass is many launches, for one prompt or for many
        return cls(8, 128, groups=1, refill=refill, prompt_tokens=65536, power_of_two_rows=graphs)


class Schedule:
    """Slots and requests of one call of ``generate``; only the first ``rows`` slots are computed."""

    def __init__(self, requests: int, slots: int, max_length: int, pace: Pace) -> None:
        self._slots, self._max_length, self._pace = slots, max_length, pace
        self.waiting = deque(range(requests))
        self.owner: list[int | None] = [None] * slots  # request of each slot
        self.reach = [0] * slots  # upper bound of each slot's position
        self.rows = self._rows_for(requests)

    @property
    def live(self) -> list[int]:
        return [slot for slot in range(self.rows) if self.owner[slot] is not None]

    @property
    def free(self) -> list[int]:
        return [slot for slot in range(self.rows) if self.owner[slot] is None]

    def take(self) -> list[tuple[int, int]]:
        """Next (request, slot) pairs to start; none while too few slots are free to be worth it."""
        free = self.free
        if len(free) < min(self._pace.refill, self.rows):
            return []
        return [(self.waiting.popleft(), slot) for slot in free[: len(self.waiting)]]

    def start(self, request: int, slot: int, position: int) -> None:
        self.owner[slot], self.reach[slot] = request, position

    def finish(self, slot: int) -> int:
        """Free a slot; returns the request that held it."""
        request = self.owner[slot]
        assert request is not None
        self.owner[slot], self.reach[slot] = None, 0
        return request

    def advance(self) -> None:
        for slot in self.live:
            self.reach[slot] = min(self.reach[slot] + self._pace.every, self._max_length - 1)

    def shrink(self) -> list[tuple[int, int]]:
        """Once nothing waits, compute few rows: (from, to) moves that fill the first ones."""
        live = self.live
        rows = self._rows_for(len(live))
        if self.waiting or rows >= self.rows:
            return []
        moves = list(zip([slot for slot in live if slot >= rows], self.free, strict=False))
        self._move(moves)
        self.rows = rows
        return moves

    def sort(self) -> list[tuple[int, int]]:
        """(from, to) moves that bring slots of like length together, when that saves a tenth of the reads."""
        order = sorted(range(self.rows), key=lambda slot: self.reach[slot])
        if self._cost(range(self.rows)) <= 1.1 * self._cost(order):
            return []
        moves = [(old, new) for new, old in enumerate(order) if old != new]
        self._move(moves)
        return moves

    def spans(self, order: Sequence[int] | None = None) -> tuple[Span, ...]:
        """Spans of the rows for the next steps, with the slots as they are or in the order given."""
        slots = range(self.rows) if order is None else order
        size, unit = -(-self.rows // self._pace.groups), self._pace.round_columns
        spans: list[Span] = []
        for start in range(0, self.rows, size):
            farthest = max(self.reach[slot] for slot in slots[start : start + size]) + self._pace.every
            columns = min(-(-farthest // unit) * unit, self._max_length)
            first = spans.pop()[0] if spans and spans[-1][2] == columns else start
            spans.append((first, min(start + size, self.rows), columns))
        return tuple(spans)

    def _cost(self, order: Sequence[int]) -> int:
        return sum((stop - start) * columns for start, stop, columns in self.spans(order))

    def _rows_for(self, requests: int) -> int:
        if self._pace.power_of_two_rows and requests > 1:
            requests = 1 << (requests - 1).bit_length()
        return min(self._slots, requests)

    def _move(self, moves: list[tuple[int, int]]) -> None:
        owner, reach = list(self.owner), list(self.reach)
        for old, _ in moves:
            self.owner[old], self.reach[old] = None, 0
        for old, new in moves:
            self.owner[new], self.reach[new] = owner[old], reach[old]
