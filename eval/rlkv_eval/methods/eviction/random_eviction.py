"""Random eviction: the control for every rule of what to drop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rlkv.errors import RLKVError
from rlkv.sampling import uniform
from rlkv_eval.methods.base import Context
from rlkv_eval.methods.eviction.generator import EvictingGenerator
from rlkv_eval.methods.eviction.plan import Plan, rounded_sparsity
from rlkv_eval.methods.eviction.policy import Policy, View


@dataclass(frozen=True)
class RandomEviction:
    """Drop a random token of the completion, in each head another; the last ``recent`` tokens are safe.

    Prompt tokens go, at random too, only where the budget leaves no other choice: it is below the length of
    the prompt, or just after the prompt, while the completion is not longer than ``recent``.
    """

    recent: int = 8

    name: ClassVar[str] = "random_eviction"
    title: ClassVar[str] = "Random eviction"
    paper: ClassVar[str] = "https://arxiv.org/abs/2609.03430"

    def __post_init__(self) -> None:
        if self.recent < 0:
            raise RLKVError(f"random_eviction: recent is a number of tokens, 0 or more; got {self.recent}")

    def build(self, context: Context, sparsity: float) -> EvictingGenerator:
        """RLKVError for a sparsity outside [0, 1]."""
        shape = context.shape
        plan = Plan.stepwise(rounded_sparsity(sparsity, shape), context.window, context.max_length)
        policy = RandomTokens(self.recent, shape.layers, shape.kv_heads)
        return EvictingGenerator(self.name, context, plan, policy)


class RandomTokens(Policy):
    """Draws belong to (seed, request, layer, head, length), so that no batch changes them."""

    def __init__(self, recent: int, layers: int, heads: int) -> None:
        self.recent, self.layers, self.heads = recent, layers, heads

    def _kind(self, view: View) -> torch.Tensor:
        """Int64 [n, H, C]: 0 for the completion, 1 for the prompt, 2 for what is recent, 3 for nothing."""
        kind = (view.positions < view.prompt).long().masked_fill(view.newest(self.recent), 2)
        return kind.masked_fill(view.empty, 3)

    def _head(self, view: View) -> torch.Tensor:
        """Int64 [H, 1]: a number for each (layer, head)."""
        heads = torch.arange(self.heads, device=view.held.device)[:, None]
        return view.layer * self.heads + heads

    def priority(self, view: View) -> torch.Tensor:
        """A random order within each kind, for the cut after the prompt: draws by position, below 0."""
        count = -1 - (view.positions.long() * self.layers * self.heads + self._head(view))
        return self._kind(view) + uniform(view.stream, count).float()

    def victim(self, view: View) -> torch.Tensor:
        """Any of the first kind that there is: one draw a head is much cheaper than one a token."""
        kind = self._kind(view)
        eligible = kind == kind.amin(-1, keepdim=True)
        rank = eligible.cumsum(-1)
        draw = uniform(view.stream, view.length * self.layers * self.heads + self._head(view))
        chosen = (draw * rank[..., -1:]).long() + 1
        return (eligible & (rank == chosen)).long().argmax(-1, keepdim=True)
