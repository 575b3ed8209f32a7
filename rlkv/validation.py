"""Held-out accuracy of the gates and of the mask that would be deployed; which gates are best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlkv.gates import HeadGates
from rlkv.penalty import gate_sparsity
from rlkv.rollout import Actor
from rlkv.sampler import SamplingParams
from rlkv.settings import TrainConfig

TOLERANCE = 0.03  # of target_sparsity


@dataclass
class Best:
    """The best gates so far.

    The rule, in this order: with a target sparsity, gates within 0.03 of it; higher accuracy of the mask at
    the validated sparsity; lower mean gate. The later of equals wins.
    """

    key: tuple[bool, float, float]
    gates: torch.Tensor
    step: int


class Validator:
    """Greedy answers to fixed held-out prompts."""

    def __init__(self, actor: Actor, config: TrainConfig) -> None:
        self.actor, self.config = actor, config
        self.which = range(min(config.validation_prompts, len(actor.prompts)))
        self.params = SamplingParams(max_new_tokens=config.max_new_tokens, temperature=0.0)

    def accuracy(self, gates: torch.Tensor) -> dict[str, float]:
        """``validation_gates`` (soft gates, training window) and ``validation_mask`` (deployed window)."""
        mask = HeadGates(gates).mask(self.config.validated_sparsity).gates()
        half = len(self.which)
        both = torch.stack([gates.detach().cpu(), mask]).repeat_interleave(half, dim=0)
        deploy, sampler = self.config.deploy_window, self.actor.sampler
        if deploy in (None, sampler.window):  # one batch: slots stay full
            scores = self.scores([*self.which, *self.which], both)
        else:
            scores = self.scores(self.which, both[:half])
            trained, sampler.window = sampler.window, deploy
            try:
                scores += self.scores(self.which, both[half:])
            finally:
                sampler.window = trained
        return {
            "validation_gates": sum(scores[:half]) / half,
            "validation_mask": sum(scores[half:]) / half,
        }

    def scores(self, which: Sequence[int], gates: torch.Tensor) -> list[float]:
        """Greedy verdicts under ``gates`` [len(which), layers, kv_heads]."""
        return [group[0].verdict.score for group in self.actor.answer(which, self.params, gates)]

    def better(
        self, best: Best | None, gates: torch.Tensor, values: dict[str, float], step: int
    ) -> Best | None:
        """A new Best if these gates, with their ``accuracy``, take the place of ``best``; else None."""
        target = self.config.target_sparsity
        landed = target is None or abs(gate_sparsity(gates) - target) <= TOLERANCE
        key = (landed, values["validation_mask"], -gates.mean().item())
        if best is not None and key < best.key:
            return None
        return Best(key, gates.detach().cpu().clone(), step)
