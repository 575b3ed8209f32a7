"""How many tokens each KV head holds at every length: fixed in advance, the same in every layer and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rlkv.support import ModelShape
from rlkv.window import Window
from rlkv_eval.methods.base import token_budget

SPARE = 16  # lengths beyond the longest request, reached by slots that finished a few steps ago

Table = np.ndarray[Any, np.dtype[np.int64]]  # int64, by a request's length in tokens


@dataclass(frozen=True)
class Plan:
    """Tokens that one KV head holds: ``held[t]`` after t tokens of prompt and completion, newest included.

    ``after_prompt[t]``: what stays of a prompt of t tokens. ``age[t]``: which query of the observation before
    the next compression token t is, from 1; 0 where none observes. ``buffered``: tokens are dropped many at
    a time, every so often; otherwise one is dropped whenever a new one finds no place.
    """

    held: Table
    after_prompt: Table
    age: Table
    buffered: bool = False

    @classmethod
    def stepwise(cls, sparsity: float, window: Window, max_length: int) -> Plan:
        """The whole budget at every length."""
        budget = _budget(sparsity, window, max_length)
        return cls(budget, budget, np.zeros_like(budget))

    @classmethod
    def in_turns(
        cls, sparsity: float, window: Window, max_length: int, *, buffer: int, share: float, observed: int
    ) -> Plan:
        """Fill the budget, then drop so many that the next ``n`` tokens fit into it, and so on.

        ``n`` is ``share`` of the budget, at most ``buffer``, and at least ``observed`` (queries that decide)
        unless that is more than half of the budget. A prompt that ends too near before a compression for
        ``observed`` queries of the completion to decide is cut so far at once that the compression is not
        needed.
        """
        budget = _budget(sparsity, window, max_length)
        held, after_prompt, age = budget.copy(), budget.copy(), np.zeros_like(budget)
        last = len(budget) - 1
        full = int(np.flatnonzero(budget == np.arange(last + 1))[-1])  # nothing is dropped up to this length
        watched = min(observed, full)
        while full < last:
            age[full - watched + 1 : full + 1] = np.arange(1, watched + 1)
            space = int(budget[full])
            turn = max(1, min(buffer, int(space * share)), min(observed, space // 2))
            stop = min(full + turn, last)
            ahead = np.arange(full + 1, stop + 1)
            held[ahead] = after_prompt[ahead] = budget[stop] - (stop - ahead)
            near = np.arange(max(1, full - observed + 1), full + 1)  # prompts that end here
            early = np.maximum(1, held[full + 1] - 1 - (full - near))
            after_prompt[near] = np.minimum(after_prompt[near], early)
            full, watched = stop, min(observed, turn)
        return cls(held, after_prompt, age, buffered=True)


def _budget(sparsity: float, window: Window, max_length: int) -> Table:
    lengths = range(max_length + SPARE)
    return np.array([token_budget(length, sparsity, window) for length in lengths], dtype=np.int64)


def rounded_sparsity(sparsity: float, shape: ModelShape) -> float:
    """The sparsity of a head mask of this model: local heads are whole ones."""
    heads = shape.layers * shape.kv_heads
    return 1 - round((1 - sparsity) * heads) / heads
