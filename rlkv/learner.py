"""One batch of graded answers -> one update of the gates (or a few)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rlkv.attention import Mixed
from rlkv.family import FamilyForward
from rlkv.logprobs import check_head, padded, response_logprobs, to_device
from rlkv.objective import advantages, policy_loss
from rlkv.penalty import Penalty, reward_factor
from rlkv.rewards import Verdict
from rlkv.settings import TrainConfig


@dataclass
class Sample:
    """One graded answer: tokens and, for each response token, the sampler's log-probability."""

    prompt: list[int]
    response: list[int]
    logprobs: list[float]
    verdict: Verdict
    task: str = ""
    mask: torch.Tensor | None = None  # [layers, kv_heads], if it was written under a mask of its own
    advantage: float = 0.0
    prox: torch.Tensor | None = None  # [response tokens], only with several updates a batch

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def pack(samples: list[Sample], budget: int, width: Callable[[int], int] = int) -> list[list[Sample]]:
    """Micro-batches of at most ``budget`` padded tokens (a longer answer goes alone), longest first.

    ``width``: tokens that a row is padded to, given those of the longest.
    """
    batches: list[list[Sample]] = []
    for sample in sorted(samples, key=len, reverse=True):
        if batches and (len(batches[-1]) + 1) * width(len(batches[-1][0])) <= budget:
            batches[-1].append(sample)
        else:
            batches.append([sample])
    return batches


def task_rewards(samples: list[list[Sample]]) -> dict[str, float]:
    """Mean reward of each task in a batch, by name."""
    scores: dict[str, list[float]] = {}
    for group in samples:
        for sample in group:
            scores.setdefault(sample.task, []).append(float(sample.verdict.score))
    return {task: sum(found) / len(found) for task, found in sorted(scores.items())}


def penalised_reward(config: TrainConfig, samples: list[list[Sample]]) -> float:
    """The reward that the penalty looks at: the batch's mean, or that of its worst task."""
    if config.penalty_reward == "worst_task":
        return min(task_rewards(samples).values())
    scores = [float(sample.verdict.score) for group in samples for sample in group]
    return sum(scores) / len(scores)


class Learner:
    """Owns the gates (float32 parameter [layers, kv_heads] on the model's device) and their optimiser.

    The model's weights are frozen, not copied; only the gates ever get a gradient.
    """

    def __init__(self, model: Any, gates: torch.Tensor, config: TrainConfig, penalty: Penalty) -> None:
        check_head(model)
        if model.device.type == "cuda" and FamilyForward.fits(model):
            FamilyForward(model, join=True)
        self.model, self.config, self.penalty = model, config, penalty
        self.gates = torch.nn.Parameter(gates.to(model.device, torch.float32))
        self.optimiser = torch.optim.AdamW(
            [self.gates],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
        )

    def update(self, samples: list[list[Sample]], step: int) -> dict[str, float]:
        """Learn from ``samples`` [prompts][samples per prompt]; returns what happened, by name."""
        rewards = torch.tensor([[float(sample.verdict.score) for sample in group] for group in samples])
        lengths = torch.tensor([[len(sample.response) for sample in group] for group in samples])
        for group, values in zip(
            samples, advantages(self.config.advantage, rewards, lengths).tolist(), strict=True
        ):
            for sample, value in zip(group, values, strict=True):
                sample.advantage = value
        reward = penalised_reward(self.config, samples)
        pressure = self.penalty.gradient(self.gates, reward, step)
        for options in self.optimiser.param_groups:
            options["lr"] = self.config.learning_rate_at(step, self.penalty.steps)
        parts = self.config.minibatches_per_batch
        if parts > 1:
            self.remember_prox([sample for group in samples for sample in group])
        totals: dict[str, float] = {}
        for part in range(parts):
            chunk = [sample for group in samples[part::parts] for sample in group]
            for key, value in self.step(chunk, pressure).items():
                totals[key] = totals.get(key, 0.0) + value / parts
        factor = reward_factor(reward, self.config.tau)
        return {"penalty_grad": pressure.abs().mean().item(), "reward_factor": factor, **totals}

    def pack(self, samples: list[Sample]) -> list[list[Sample]]:
        """Micro-batches of the budget, as wide as they are padded on this device."""
        width = padded if self.model.device.type == "cuda" else int
        return pack(samples, self.config.max_tokens_per_microbatch, width)

    def step(self, samples: list[Sample], pressure: torch.Tensor) -> dict[str, float]:
        """One optimiser step. Answers of advantage 0 only add their tokens to the mean: not computed."""
        self.optimiser.zero_grad()
        total = sum(len(sample.response) for sample in samples)
        useful = [sample for sample in samples if sample.advantage != 0 and sample.response]
        sums = torch.zeros(4, dtype=torch.float64, device=self.gates.device)
        trained = sum(len(sample.response) for sample in useful)
        mixed = Mixed(self.gates, self.config.window)
        for batch in self.pack(useful):
            flat = policy_loss(
                self.logprobs(batch, mixed),
                self.join([torch.tensor(sample.logprobs) for sample in batch]),
                self.join([torch.full((len(sample.response),), sample.advantage) for sample in batch]),
                prox=None if batch[0].prox is None else self.join([sample.prox for sample in batch]),
                clip=self.config.clip,
                weight_cap=self.config.weight_cap,
            )
            loss = flat.loss.sum() / total
            loss.backward()
            parts = (flat.loss.detach().sum() / total, flat.clipped.sum(), flat.weight.sum(), flat.gap.sum())
            sums += torch.stack([part.double() for part in parts])
        policy_grad = 0.0 if self.gates.grad is None else self.gates.grad.abs().mean().item()
        self.gates.grad = pressure.clone() if self.gates.grad is None else self.gates.grad + pressure
        norm = torch.nn.utils.clip_grad_norm_([self.gates], self.config.max_grad_norm).item()
        finite = math.isfinite(norm)
        if finite:
            self.optimiser.step()
            with torch.no_grad():
                self.gates.clamp_(0, 1)
        loss_value, clipped, weight, gap = sums.tolist()
        shown = max(trained, 1)
        return {
            "policy_loss": loss_value,
            "policy_grad": policy_grad,
            "grad_norm": norm,
            "skipped_update": float(not finite),
            "clip_fraction": clipped / shown,
            "behaviour_weight": weight / shown if trained else 1.0,
            "logprob_gap": gap / shown,
            "trained_fraction": trained / max(total, 1),
        }

    def logprobs(self, batch: list[Sample], mixed: Mixed) -> torch.Tensor:
        """Under the current gates, at the sampling temperature: [response tokens of the batch]."""
        rows = [(sample.prompt, sample.response) for sample in batch]
        if not (self.config.gradient_checkpointing and torch.is_grad_enabled()):
            return response_logprobs(self.model, rows, self.config.temperature, mixed)
        self.model.train()  # layers are recomputed only in training mode
        try:
            return response_logprobs(self.model, rows, self.config.temperature, mixed)
        finally:
            self.model.eval()

    @torch.no_grad()
    def remember_prox(self, samples: list[Sample]) -> None:
        """Keep the log-probabilities before the first of several updates."""
        useful = [sample for sample in samples if sample.advantage != 0 and sample.response]
        mixed = Mixed(self.gates, self.config.window)
        for batch in self.pack(useful):
            lengths = [len(sample.response) for sample in batch]
            for sample, prox in zip(batch, self.logprobs(batch, mixed).split(lengths), strict=True):
                sample.prox = prox

    def join(self, pieces: list[Any]) -> torch.Tensor:
        return to_device(torch.cat(pieces).float(), self.gates.device)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: copies on the CPU."""
        return {"gates": self.gates.detach().cpu().clone(), "optimiser": to_cpu(self.optimiser.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        with torch.no_grad():
            self.gates.copy_(state["gates"])
        self.optimiser.load_state_dict(state["optimiser"])


def to_cpu(value: Any) -> Any:
    """Copies of all tensors in nested containers, on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    return [to_cpu(item) for item in value] if isinstance(value, list) else value
