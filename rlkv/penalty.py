"""Pressure towards sparsity: the paper's adaptive L1 penalty, and a controller for a wanted sparsity.

**Paper** (section 3, eq. 5): beta * c(rbar) * mean|gate|, c = exp(rbar) - 1 if rbar > tau else 0, where rbar
is the mean reward of the batch. Each gate feels beta * c / (layers * kv_heads), so at equal beta a small
model is pressed harder; about 4e-4 * c a gate, the size of the policy gradient there, ranked best on a
32-gate model.

**Target** s (ours; the paper tunes beta by hand). AdamW makes steps of about the learning rate whatever the
gradient's size, so beta alone cannot stop at a sparsity: gates that matter little fall together and pass the
target together. In our simulation (tests/test_penalty.py) changing beta, even its sign, left the sparsity .15
to .25 off. And stopping the fall at the target stops the ranking too: which gates passed it first is chance
(LOG.md: a mask of 61 % where the gates had 97 %). So the run ranks first and lands then:

- The first half is the paper's penalty, whatever the target, until the gates that matter stand apart.
- Then the pressure is divided by rank, as the mask will be (it keeps the top 1 - s). The round(s * n) lowest
  gates are always pushed down; gates that are equal, at 0 say, rank by their mean over the run. The others
  feel the same push times u = clip((s - sparsity) / 0.1, -1, 1): the whole push well below the target; none
  at the target, where only the reward moves them; the opposite beyond it, which pulls them back.

Where two gates change places they change sides, so a head that turns out to matter comes back and the weakest
kept head falls in its stead: the ranking stays open. ``sparsity`` counts a gate 1 below .25, 0 above .75 and
linearly between, so that the brake acts before gates cross; at the end, with the gates apart, it is
``gate_sparsity``. beta is multiplied by exp(integral), integral += 0.05 * the miss up to 3: in the first half
while the sparsity is below the target, then on either side of it. While rbar <= tau nothing is pushed down
and the integral waits. In the last third of the run c is at least c(tau): the mask will be deployed at s
anyway, so heads must be ranked there. Landing needs learning rate * steps above 2.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from rlkv.errors import RLKVError

WIDTH, GAIN, HIGHEST = 0.1, 0.05, 3.0
LANDING, DEADLINE = 1 / 2, 2 / 3  # of the steps


def reward_factor(reward: float, tau: float) -> float:
    """c(rbar): exp(rbar) - 1 above tau, else 0."""
    return math.expm1(reward) if reward > tau else 0.0


def gate_sparsity(gates: torch.Tensor) -> float:
    """The fraction of gates below 0.5: what ``target_sparsity`` is about, and what a mask of it would cut."""
    return (gates < 0.5).float().mean().item()


class Penalty:
    """beta * c(rbar) * mean|gate|, steered towards ``target`` (None: the paper's fixed beta) over ``steps``.

    Call once a step, after that step's rewards: the state (integral, mean gates) advances with each call.
    """

    def __init__(self, beta: float, tau: float, target: float | None = None, steps: int = 0) -> None:
        if beta < 0:
            raise RLKVError(f"penalty: beta must be 0 or more, got {beta}")
        if target is not None and not 0 <= target <= 1:
            raise RLKVError(f"target_sparsity must lie in [0, 1], got {target}")
        if target is not None and beta == 0:
            raise RLKVError("target_sparsity needs a penalty above 0 to press with")
        self.beta, self.tau, self.target, self.steps = beta, tau, target, steps
        self.integral = 0.0
        self.mean: torch.Tensor | None = None  # of the gates so far, flat

    def gradient(self, gates: torch.Tensor, reward: float, step: int) -> torch.Tensor:
        """d penalty / d gates at step ``step`` (from 0), same shape as ``gates``; all gates are in [0, 1]."""
        c = reward_factor(reward, self.tau)
        if self.target is None:
            return torch.full_like(gates, self.beta * c / gates.numel())
        flat = gates.detach().flatten()
        past = flat if self.mean is None else self.mean.to(flat)
        self.mean = past + (flat - past) / (step + 1)
        error = self.target - ((0.75 - flat) / 0.5).clamp(0, 1).mean().item()
        if step >= DEADLINE * self.steps:
            c = max(c, math.expm1(self.tau))
        landing = step >= LANDING * self.steps
        if (c > 0 and error > 0) or (landing and error < 0):
            self.integral = min(HIGHEST, self.integral + GAIN * abs(error))
        weights = torch.full_like(flat, c)
        if landing:
            push = max(-1.0, min(1.0, error / WIDTH))
            # pulling back needs no reward: it brings reward
            weights[:] = push * (c if push > 0 else max(c, math.expm1(self.tau)))
            order = self.mean.argsort(stable=True)
            lowest = order[flat[order].argsort(stable=True)][: round(self.target * flat.numel())]
            weights[lowest] = c
        return (self.effective_beta / flat.numel() * weights).view_as(gates)

    @property
    def effective_beta(self) -> float:
        """beta after the controller."""
        return self.beta * math.exp(self.integral)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"integral": self.integral, "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self.integral, self.mean = state["integral"], state.get("mean")
