"""One decoding step of local heads in plain PyTorch; on a GPU an engine's kernels do the same."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def decode_local(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    filled: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """query [B, heads * groups, D] -> the same; the new token is stored already.

    keys, values: the layer's pool [rows, heads, D]; rows, filled [B, size] from :meth:`Slots.held`.
    """
    batch, _, dim = query.shape
    heads = keys.shape[1]
    grouped = query.reshape(batch, heads, -1, dim)
    k, v = keys[rows].transpose(1, 2), values[rows].transpose(1, 2)
    mask = filled[:, None, None]
    output = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scaling)
    return output.reshape(query.shape)
