"""Held-out accuracy of the gates and of the mask that would be deployed; which gates are best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rlkv.gates import HeadGates
from rlkv.penalty import gate_sparsity
from rlkv.rollout import Actor
from rlkv.sampler import Sampler, SamplingParams
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
        soft = gates.detach().cpu().expand(len(self.which), -1, -1)
        hard = mask.expand(len(self.which), -1, -1)
        deploy = self.config.deploy_window
        if deploy is None or deploy == self.config.window:
            both = self.scores(self.actor, [*self.which, *self.which], torch.cat([soft, hard]))
            half = len(self.which)
        else:
            old = self.actor.sampler
            sampler = Sampler(
                old.model, deploy, slots=old.slots, max_length=old.max_length, prefill=self.config.prefill
            )
            other = Actor(sampler, self.actor.tokenizer, self.actor.prompts, self.actor.reward)
            both = self.scores(self.actor, list(self.which), soft)
            half = len(both)
            both += self.scores(other, list(self.which), hard)
        return {
            "validation_gates": sum(both[:half]) / half,
            "validation_mask": sum(both[half:]) / half,
        }

    def scores(self, actor: Actor, which: list[int], gates: torch.Tensor) -> list[float]:
        return [group[0].verdict.score for group in actor.answer(which, self.params, gates)]

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

    def state(self, best: Best | None) -> dict[str, Any] | None:
        return None if best is None else {"key": best.key, "gates": best.gates, "step": best.step}
