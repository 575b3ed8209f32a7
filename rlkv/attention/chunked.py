"""The fast path on CPU and GPU: full attention by PyTorch's fused kernel, local attention in query blocks.

A local head's cost is sink + recent + block keys a query, whatever the length, and nothing of size length x
length is ever built, in the forward or in the backward pass. Every function here takes whole sequences
without padding; :func:`over_sequences` cuts padded and packed batches into them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F

from rlkv.attention.layout import Sequences
from rlkv.attention.reference import expand_kv
from rlkv.window import Window


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Full causal attention: query [B, Hq, T, D]; key, value [B, Hkv, T, D]; returns [B, Hq, T, D]."""
    groups = query.shape[1] // key.shape[1]
    if query.is_cuda and query.dtype == torch.float32:  # no fused kernel there takes grouped heads
        key, value, groups = expand_kv(key, groups), expand_kv(value, groups), 1
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=groups > 1
    )


def local_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: Window, scaling: float
) -> torch.Tensor:
    """Sink + recent attention; shapes as in :func:`causal_attention`.

    Queries go in blocks; the keys of a block are the sink and a band that ends with the block.
    """
    batch, query_heads, length, dim = query.shape
    if length <= window.size:  # the window still holds everything
        return causal_attention(query, key, value, scaling)
    kv_heads = key.shape[1]
    groups = query_heads // kv_heads
    block = max(16, min(128, window.recent))
    blocks = -(-length // block)
    tail = blocks * block - length
    band = -(-(window.sink + window.recent - 1 + block) // 16) * 16 - window.sink  # aligned for GPU kernels

    def per_block(states: torch.Tensor) -> torch.Tensor:
        """[B, Hkv, T, D] -> [B * Hkv, blocks, sink + band, D]."""
        bands = F.pad(states, (0, 0, band - block, tail)).unfold(2, band, block).transpose(-1, -2)
        sink = states[:, :, None, : window.sink].expand(-1, -1, blocks, -1, -1)
        return torch.cat([sink, bands], dim=3).flatten(0, 1)

    shape = (batch, kv_heads, groups, blocks, block, dim)
    queries = F.pad(query, (0, 0, 0, tail)).view(shape).transpose(2, 3)
    queries = queries.reshape(batch * kv_heads, blocks, groups * block, dim)
    visible = _band_mask(blocks, block, band, window, query.device).repeat(1, groups, 1)
    output = F.scaled_dot_product_attention(
        queries, per_block(key), per_block(value), attn_mask=visible, scale=scaling
    )
    output = output.view(batch, kv_heads, blocks, groups, block, dim).transpose(2, 3)
    return output.reshape(batch, query_heads, blocks * block, dim)[:, :, :length]


@lru_cache(maxsize=8)  # layers and documents of one length share it
def _band_mask(blocks: int, block: int, band: int, window: Window, device: torch.device) -> torch.Tensor:
    """Bool [blocks, block, sink + band]: the sink's own keys are hidden from the band, not seen twice."""
    stop = torch.arange(1, blocks + 1, device=device)[:, None, None] * block
    query = stop - block + torch.arange(block, device=device)[:, None]
    sink = torch.arange(window.sink, device=device).expand(blocks, 1, -1)
    key = stop - band + torch.arange(band, device=device)
    return torch.cat([sink <= query, (key >= window.sink) & window.sees(query, key)], dim=-1)


def mixed_chunked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gates: torch.Tensor,
    window: Window,
    scaling: float,
) -> torch.Tensor:
    """gate * full + (1 - gate) * local; gates [Hkv] or [B, Hkv], the rest as in :func:`causal_attention`."""
    full = causal_attention(query, key, value, scaling)
    local = local_attention(query, key, value, window, scaling)
    groups = query.shape[1] // key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    gate = gates.reshape(-1, key.shape[1]).repeat_interleave(groups, dim=1)[:, :, None, None].to(wide)
    return torch.lerp(local.to(wide), full.to(wide), gate).to(query.dtype)


def over_sequences(
    kernel: Callable[..., torch.Tensor],
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    gates: torch.Tensor | None,
    sequences: Sequences | None,
) -> torch.Tensor:
    """Run ``kernel(query, key, value[, gates])`` on every sequence by itself; padding's outputs are 0.

    None means that each row is a sequence from its first token on, so that one call does.
    """
    if sequences is None:
        return kernel(*states) if gates is None else kernel(*states, gates)
    query = states[0]
    output = torch.zeros_like(query)
    for row, start, stop in sequences:
        parts = [part[row : row + 1, :, start:stop] for part in states]
        if gates is not None:
            parts.append(gates if gates.ndim == 1 else gates[row])
        output[row : row + 1, :, start:stop] = kernel(*parts)
    return output
