"""The policy objective as pure functions (paper section 3, equations 3 and 4; no critic, no KL term).

Rewards come as [prompts, samples]. Every response token carries its response's advantage; the loss is the
mean over all response tokens of the batch, so a long answer weighs as much as its tokens do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlkv.errors import RLKVError


def group_advantages(rewards: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """(r - mean) / (std + eps) among the samples of one prompt (paper eq. 3); [prompts, samples] -> same.

    std is the unbiased one. A prompt whose samples all got the same reward has advantage exactly 0.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    if rewards.shape[1] < 2:
        return torch.zeros_like(rewards)
    return torch.where(equal, 0.0, centred / (rewards.std(dim=1, keepdim=True) + eps))


def batch_advantages(rewards: torch.Tensor, lengths: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """What the authors' code does instead: normalise over all response tokens of the batch.

    mean and unbiased std are taken over tokens, so responses weigh by ``lengths`` (tokens, same shape as
    ``rewards``). A batch whose rewards are all the same has advantage exactly 0. (Their scaling of rewards to
    +-5 only makes eps smaller: here eps is relative to rewards in [0, 1].)
    """
    if bool((rewards == rewards.flatten()[0]).all()):
        return torch.zeros_like(rewards)
    weights = lengths.to(rewards.dtype)
    total = weights.sum()
    mean = (weights * rewards).sum() / total
    variance = (weights * (rewards - mean) ** 2).sum() / (total - 1).clamp(min=1)
    return (rewards - mean) / (variance.sqrt() + eps)


def advantages(kind: str, rewards: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """``kind``: "group" (the paper) or "batch" (the authors' code); rewards, lengths [prompts, samples]."""
    if kind == "group":
        return group_advantages(rewards)
    if kind == "batch":
        return batch_advantages(rewards, lengths)
    raise RLKVError(f"advantage: expected group or batch, got {kind!r}")


@dataclass
class TokenLoss:
    """Per-token values of one micro-batch, each [tokens] float32; only ``loss`` carries a gradient."""

    loss: torch.Tensor
    clipped: torch.Tensor  # True where the clip took the gradient away
    weight: torch.Tensor  # behaviour weight w after the cap
    gap: torch.Tensor  # |new - old|: how far the trainer's policy is from the sampler's


def policy_loss(
    new: torch.Tensor,
    old: torch.Tensor,
    advantage: torch.Tensor,
    *,
    prox: torch.Tensor | None = None,
    clip: float = 0.4,
    weight_cap: float = 5.0,
) -> TokenLoss:
    """Clipped decoupled loss of each token: max(-A rho, -A clip(rho, 1 - clip, 1 + clip)) * w.

    rho = exp(new - prox) and w = exp(prox - old), with w := 0 above ``weight_cap``. ``new`` are log-probs
    under the current gates (with gradient), ``old`` those the sampler reported, ``prox`` those before the
    first update on this batch, all [tokens] at one temperature. prox None means the first and only update:
    then rho is 1 and its value need not be computed by a second forward pass.
    """
    prox = new.detach() if prox is None else prox
    ratio = torch.exp(new - prox)
    weight = torch.exp(prox - old)
    weight = torch.where(weight > weight_cap, 0.0, weight)
    plain, bounded = -advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)
    return TokenLoss(
        loss=torch.maximum(plain, bounded) * weight,
        clipped=(bounded > plain).detach(),
        weight=weight,
        gap=(new.detach() - old).abs(),
    )
