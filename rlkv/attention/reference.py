"""Mixed attention in plain PyTorch: the judge of every faster path (paper eq. 2)."""

from __future__ import annotations

import torch


def expand_kv(states: torch.Tensor, groups: int) -> torch.Tensor:
    """Repeat each KV head for its query heads: [B, Hkv, T, D] -> [B, Hkv * groups, T, D]."""
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def probabilities(scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Softmax in float32 (or wider) over the visible keys; ``scores`` [B, H, Tq, Tk], ``visible`` bool."""
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def mixed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gates: torch.Tensor,
    full: torch.Tensor,
    local: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """gate * full attention + (1 - gate) * local attention, for each query head with its KV head's gate.

    query [B, Hq, Tq, D]; key, value [B, Hkv, Tk, D]; gates [Hkv] or [B, Hkv]; full, local: bool
    [B or 1, 1, Tq, Tk]. Returns [B, Hq, Tq, D] in query's dtype. Mixing probabilities and mixing outputs are
    the same thing; with every gate 1 the operations are those of transformers' eager attention, bit for bit.
    """
    groups = query.shape[1] // key.shape[1]
    scores = torch.matmul(query, expand_kv(key, groups).transpose(2, 3)) * scaling
    gate = gates.reshape(-1, key.shape[1]).repeat_interleave(groups, dim=1)[:, :, None, None]
    gate = gate.to(torch.promote_types(query.dtype, torch.float32))
    mixed = gate * probabilities(scores, full) + (1 - gate) * probabilities(scores, local)
    return torch.matmul(mixed.to(query.dtype), expand_kv(value, groups))
