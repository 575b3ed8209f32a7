"""H2O: keep the recent tokens, and of the others those that drew most attention so far ("heavy hitters")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rlkv.errors import RLKVError
from rlkv_eval.methods.base import Context
from rlkv_eval.methods.eviction.generator import EvictingGenerator
from rlkv_eval.methods.eviction.plan import Plan, rounded_sparsity
from rlkv_eval.methods.eviction.policy import Policy, View

SCORES_AT_ONCE = 2**26  # of a prompt, in float32


@dataclass(frozen=True)
class H2O:
    """Zhang et al. 2023, algorithm 1. ``recent``: share of the budget for the newest tokens.

    A token's score is the attention that it drew from every query since it came, over the keys then held,
    summed over the query heads that share its KV head; in the prompt attention is causal. One token goes
    when a new one finds no place, the new one included in the budget.
    """

    recent: float = 0.5

    name: ClassVar[str] = "h2o"
    title: ClassVar[str] = "H2O"
    paper: ClassVar[str] = "https://arxiv.org/abs/2306.14048"

    def __post_init__(self) -> None:
        if not 0 <= self.recent < 1:
            raise RLKVError(f"h2o: recent is a share of the budget, from 0 to below 1; got {self.recent}")

    def build(self, context: Context, sparsity: float) -> EvictingGenerator:
        """RLKVError for a sparsity outside [0, 1]."""
        plan = Plan.stepwise(rounded_sparsity(sparsity, context.shape), context.window, context.max_length)
        return EvictingGenerator(self.name, context, plan, HeavyHitters(self.recent))


class HeavyHitters(Policy):
    """Scores are summed attention."""

    def __init__(self, recent: float) -> None:
        self.recent = recent

    def priority(self, view: View) -> torch.Tensor:
        newest = view.newest((view.budget * self.recent).long())
        return view.score.masked_fill(newest, torch.inf)

    def see_prompt(
        self, query: torch.Tensor, key: torch.Tensor, lengths: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        slots, heads, count, dim = key.shape
        grouped = query.view(slots, heads, -1, count, dim)
        place = torch.arange(count, device=key.device)
        padding = place >= lengths[:, None] - 1
        score = torch.zeros(slots, heads, count, dtype=torch.float32, device=key.device)
        block = max(1, SCORES_AT_ONCE // (query.shape[0] * query.shape[1] * count))
        for first in range(0, count, block):
            last = min(first + block, count)
            scores = torch.matmul(grouped[:, :, :, first:last] * scaling, key[:, :, None].transpose(3, 4))
            scores = scores.masked_fill(place > place[first:last, None], -torch.inf)
            weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
            weights = weights.masked_fill(padding[:, None, None, first:last, None], 0)
            score += weights.sum((2, 3))
        return score

    def see_step(self, view: View, scores: torch.Tensor, weights: torch.Tensor) -> None:
        view.score.add_(weights.sum(2))
