"""Where every slot stands. Lengths and cells follow from the plan: the host need not ask the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlkv_eval.methods.eviction.plan import Plan, Table


class Ledger:
    """By slot: ``length`` (tokens in), ``prompt`` (of these, the prompt's), ``held`` (cells in use)."""

    def __init__(self, plan: Plan, slots: int) -> None:
        self.plan = plan
        self.length, self.prompt, self.held = (np.ones(slots, dtype=np.int64) for _ in range(3))
        self.grows, self.live = (np.zeros(slots, dtype=bool) for _ in range(2))

    def admit(self, slot: int, prompt: int) -> None:
        """A request whose prompt of that many tokens is in, but for its last one."""
        self.length[slot] = self.held[slot] = prompt - 1
        self.prompt[slot], self.live[slot] = prompt, True

    def finish(self, slot: int) -> None:
        self.live[slot] = False

    def step(self, rows: int) -> None:
        """One more token in each live slot among the first ``rows``: in a new cell, or in a dropped one's."""
        live, length, held = self.live[:rows], self.length[:rows], self.held[:rows]
        length += live & (length < len(self.plan.held) - 2)
        room = np.where(length <= self.prompt[:rows], length, self.plan.held[length])
        self.grows[:rows] = live & (held < room)
        held += self.grows[:rows]

    def due(self, rows: int) -> tuple[Table, Table]:
        """Slots that hold too much after this step, and how many tokens each may keep."""
        length, held = self.length[:rows], self.held[:rows]
        room = held if not self.plan.buffered else self.plan.held[length + 1] - 1
        room = np.where(length <= self.prompt[:rows], self.plan.after_prompt[length], room)
        slots = np.flatnonzero(self.live[:rows] & (held > room))
        return slots, room[slots]

    def cut(self, slots: Table, kept: Table) -> None:
        self.held[slots] = kept

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """(from, to): rows change places."""
        source, target = np.array(moves).T
        for values in (self.length, self.prompt, self.held, self.live):
            moved = values[source]
            if values is self.live:
                values[source] = False
            values[target] = moved
