"""Slots of the paged sampler: what the decode step reads and writes, and the requests that wait or write."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from rlkv.paged.tables import Rows
from rlkv.sampling import SamplingParams
from rlkv.slot_state import SlotState


class PagedState(SlotState):
    """Rows at position -1 are empty: they store nothing and read nothing."""

    def __init__(self, slots: int, max_length: int, layers: int, kv_heads: int, device: torch.device) -> None:
        super().__init__(slots, max_length, layers, kv_heads, device)
        self.full = torch.ones(slots, layers, kv_heads, dtype=torch.bool, device=device)
        self.clear()

    def begin(
        self, slots: torch.Tensor, token: torch.Tensor, logprob: torch.Tensor, stop: torch.Tensor
    ) -> None:
        """Take the token that follows what ``slots`` (int64 [n]) were admitted with."""
        count = self.count[slots]
        self.tokens[slots, count], self.logprobs[slots, count] = token, logprob
        self.token[slots] = token
        self.position[slots] += 1
        self.count[slots] = count + 1
        self.active[slots] = (count + 1 < self.limit[slots]) & (token[:, None] != stop).all(-1)

    def clear(self) -> None:
        """No slot has a request."""
        self.active.fill_(False)
        self.position.fill_(-1)

    def leave(self, slots: torch.Tensor) -> None:
        """``slots`` (int64 [n]) have no request any more."""
        self.active[slots] = False
        self.position[slots] = -1


@dataclass
class Job:
    """A request: its tokens are the prompt and whatever it wrote before it had to give its pages up."""

    index: int
    tokens: list[int]
    prompt: int  # tokens of the prompt
    limit: int  # most tokens to write
    rows: Rows
    gates: Hashable  # what tells its gates from others'
    logprobs: list[float] = field(default_factory=list)

    @property
    def same(self) -> Hashable:
        """Equal for requests that hold the same keys and values once their tokens are in."""
        return (*self.tokens, self.prompt, self.gates)

    @property
    def most(self) -> int:
        """Tokens that it may come to hold."""
        return self.prompt + self.limit


def make_jobs(
    prompts: list[list[int]], gates: np.ndarray, hard: bool, max_new_tokens: int, max_length: int
) -> deque[Job]:
    """Jobs in order; ``gates`` float32 [1 or prompts, layers, kv_heads], all 0 or 1 if ``hard``."""
    rows = [Rows.of(own == 1 if hard else np.ones_like(own, dtype=bool)) for own in gates]
    names = [own.tobytes() for own in gates]
    return deque(
        Job(
            index,
            prompt,
            len(prompt),
            min(max_new_tokens, max_length - len(prompt)),
            rows[index % len(rows)],
            names[index % len(names)],
        )
        for index, prompt in enumerate(prompts)
    )


@dataclass
class Live:
    """A request in a slot; ``at``: position of the token that goes in next."""

    job: Job
    at: int


@dataclass
class Run:
    """One call of ``generate``. ``live``: by slot, in order of admission."""

    jobs: int
    params: SamplingParams
    gates: torch.Tensor | None  # [1 or N, layers, kv_heads]
    hard: bool  # every gate is 0 or 1: local heads hold their window alone
    keys: torch.Tensor
    stop: torch.Tensor
    waiting: deque[Job]
    live: dict[int, Live] = field(default_factory=dict)

    @property
    def soft(self) -> bool:
        return self.gates is not None and not self.hard

    def gates_of(self, indices: Sequence[int]) -> torch.Tensor | None:
        """[len(indices), layers, kv_heads]"""
        if self.gates is None:
            return None
        if len(self.gates) == 1:
            return self.gates.expand(len(indices), -1, -1)
        return self.gates[torch.tensor(indices, dtype=torch.int64, device=self.gates.device)]
