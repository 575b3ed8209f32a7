"""Attention by positions, for forwards that add several tokens to older ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rlkv.window import Window

QUERIES_AT_ONCE = 256  # callers cut longer turns into such pieces, which bounds the mask


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_position: torch.Tensor,
    key_position: torch.Tensor,
    scaling: float,
    window: Window | None = None,
) -> torch.Tensor:
    """query [B, n, groups, T, D] over key, value [B, n, K, D], by positions [B, T] and [B, K]; like query.

    Negative positions are padding: hidden, except that a padding query sees itself, so that no row is empty.
    """
    batch, heads, groups, count, dim = query.shape
    query_position, key_position = query_position[:, :, None], key_position[:, None]
    visible = ((key_position >= 0) | (key_position == query_position)) & (key_position <= query_position)
    if window is not None:
        visible &= window.sees(query_position, key_position)
    visible = visible[:, None].repeat(1, 1, groups, 1)  # [B, 1, groups * T, K]
    folded = query.reshape(batch, heads, groups * count, dim)
    output = F.scaled_dot_product_attention(folded, key, value, attn_mask=visible, scale=scaling)
    return output.view(query.shape)
