"""StreamingLLM: the first tokens and the most recent ones, in every head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rlkv.errors import RLKVError
from rlkv_eval.methods.base import Context
from rlkv_eval.methods.eviction.generator import EvictingGenerator
from rlkv_eval.methods.eviction.plan import Plan, rounded_sparsity
from rlkv_eval.methods.eviction.policy import Policy, View


@dataclass(frozen=True)
class Streaming:
    """Xiao et al. 2023, at true positions (theirs count within the cache). ``sink`` None: the window's.

    All heads are alike, so at equal bytes the recent part is far longer than a local head's.
    """

    sink: int | None = None

    name: ClassVar[str] = "streaming"
    title: ClassVar[str] = "StreamingLLM"
    paper: ClassVar[str] = "https://arxiv.org/abs/2309.17453"

    def __post_init__(self) -> None:
        if self.sink is not None and self.sink < 0:
            raise RLKVError(f"streaming: sink is a number of tokens, 0 or more; got {self.sink}")

    def build(self, context: Context, sparsity: float) -> EvictingGenerator:
        """RLKVError for a sparsity outside [0, 1]."""
        plan = Plan.stepwise(rounded_sparsity(sparsity, context.shape), context.window, context.max_length)
        sink = context.window.sink if self.sink is None else self.sink
        return EvictingGenerator(self.name, context, plan, SinkAndRecent(sink))


class SinkAndRecent(Policy):
    """The oldest goes first, except the sink."""

    def __init__(self, sink: int) -> None:
        self.sink = sink

    def priority(self, view: View) -> torch.Tensor:
        return view.positions.float().masked_fill(view.positions < self.sink, torch.inf)
