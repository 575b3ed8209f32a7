"""Gates learned from sampled masks (``estimator: masks``; ours, not the paper's): trained as deployed.

A soft gate may settle where a head works at half strength, and a mask then cuts it off (LOG.md, 2026-11-22).
Here every answer is written under a hard mask of its own: each head is full with the probability that its
gate says. REINFORCE on the masks' log-probability moves the logits of the gates: no pass through the model.
"""

from __future__ import annotations

from typing import Any

import torch

from rlkv.learner import Sample, penalised_reward, to_cpu
from rlkv.penalty import Penalty, reward_factor
from rlkv.settings import TrainConfig

SHARPEST = 0.01  # gates stay this far from 0 and 1, so that every head is tried at times


class MaskLearner:
    """Owns the logits of the gates, float32 [layers, kv_heads] on the CPU, and their optimiser."""

    def __init__(self, gates: torch.Tensor, config: TrainConfig, penalty: Penalty) -> None:
        self.config, self.penalty = config, penalty
        start = gates.detach().float().cpu().clamp(SHARPEST, 1 - SHARPEST)
        self.logits = torch.nn.Parameter(torch.logit(start))
        self.optimiser = torch.optim.Adam(
            [self.logits], lr=config.learning_rate, betas=(config.beta1, config.beta2)
        )

    @property
    def gates(self) -> torch.Tensor:
        """[layers, kv_heads]: the probability that a head is full."""
        return self.logits.detach().sigmoid()

    def draw(self, count: int, seed: int) -> torch.Tensor:
        """``count`` masks, float32 [count, layers, kv_heads] of 0 and 1; the same for the same seed."""
        uniform = torch.rand(count, *self.logits.shape, generator=torch.Generator().manual_seed(seed))
        return (uniform < self.gates).float()

    def update(self, samples: list[list[Sample]], step: int) -> dict[str, float]:
        """Learn from ``samples`` [prompts][samples per prompt], each with its mask."""
        rewards = torch.tensor([[float(sample.verdict.score) for sample in group] for group in samples])
        others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)  # leave-one-out baseline
        masks = torch.stack([sample.mask for group in samples for sample in group])  # type: ignore[misc]
        score = masks - self.gates  # of log p(mask) with respect to the logits
        policy = -((rewards - others).flatten()[:, None, None] * score).mean(0)
        reward = penalised_reward(self.config, samples)
        pressure = self.penalty.gradient(self.gates, reward, step) * self.gates * (1 - self.gates)
        for options in self.optimiser.param_groups:
            options["lr"] = self.config.learning_rate_at(step, self.penalty.steps)
        self.logits.grad = policy + pressure
        norm = torch.nn.utils.clip_grad_norm_([self.logits], self.config.max_grad_norm).item()
        self.optimiser.step()
        with torch.no_grad():
            edge = torch.logit(torch.tensor(1 - SHARPEST)).item()
            self.logits.clamp_(-edge, edge)
        return {
            "penalty_grad": pressure.abs().mean().item(),
            "reward_factor": reward_factor(reward, self.config.tau),
            "policy_grad": policy.abs().mean().item(),
            "grad_norm": norm,
            "trained_fraction": 0.0,
        }

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"logits": self.logits.detach().clone(), "optimiser": to_cpu(self.optimiser.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        with torch.no_grad():
            self.logits.copy_(state["logits"])
        self.optimiser.load_state_dict(state["optimiser"])
