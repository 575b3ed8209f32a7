"""Generation with a head mask: full heads keep every token, local heads the window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rlkv.mask import HeadMask
from rlkv.sampler import Completion, Sampler, SamplingParams
from rlkv_eval.methods.base import Context


@dataclass
class HeadGenerator:
    """The sampler of ``rlkv`` under one mask; generators of one context share the sampler's memory."""

    name: str
    mask: HeadMask
    context: Context

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        on_finish: Callable[[Completion], None] | None = None,
    ) -> list[Completion]:
        """Completions in prompt order. RLKVError for a prompt that is empty or leaves no room."""
        return shared_sampler(self.context).generate(prompts, params, self.mask.gates(), on_finish)

    def kv_bytes(self, length: int) -> int:
        """Bytes that the mask's full and local heads hold of ``length`` tokens."""
        return self.mask.kv_bytes(length)


def masked(context: Context, name: str, scores: torch.Tensor, sparsity: float) -> HeadGenerator:
    """Keep the heads of highest ``scores`` (real [layers, kv_heads]) full; ties by the context's seed."""
    mask = HeadMask.from_scores(scores, sparsity, seed=context.seed, **recorded(context))
    return HeadGenerator(name, mask, context)


def recorded(context: Context) -> dict[str, Any]:
    """What a mask records of the run."""
    return {"window": context.window, "model": context.shape}


def shared_sampler(context: Context) -> Sampler:
    """The context's one sampler: its slots take most of a GPU's memory, so it is made once."""
    made = (id(context.model), context.window, context.prefill, context.slots, context.max_length)
    if context.shared.get("sampler_of") != made:
        context.shared.pop("sampler", None)  # free its memory before the next one takes its own
        context.shared["sampler"] = Sampler(
            context.model,
            context.window,
            slots=context.slots,
            max_length=context.max_length,
            prefill=context.prefill,
        )
        context.shared["sampler_of"] = made
    return context.shared["sampler"]
