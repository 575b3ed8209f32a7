"""The small steps between matrix products, one launch each: residual + RMSNorm, rotary, SiLU times up.

Numbers are rounded where transformers rounds them, except inside the rotary embedding, which is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _add_norm_kernel(x, residual, weight, normed, summed, eps, width, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    total = tl.load(x + row * width + at, mask=inside, other=0.0)
    if ADD:
        total = total + tl.load(residual + row * width + at, mask=inside, other=0.0)
        tl.store(summed + row * width + at, total, mask=inside)
    wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    scaled = (wide * scale).to(total.dtype)
    tl.store(normed + row * width + at, tl.load(weight + at, mask=inside, other=0.0) * scaled, mask=inside)


def add_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual [n, width] -> (RMSNorm(x + residual) * weight, x + residual); no residual: of x itself."""
    x = x.contiguous()
    normed = torch.empty_like(x)
    summed = x if residual is None else torch.empty_like(x)
    width = x.shape[1]
    block = 1 << (width - 1).bit_length()
    _add_norm_kernel[(len(x),)](
        x, x if residual is None else residual, weight, normed, summed, eps, width,
        ADD=residual is not None, BLOCK=block, num_warps=8 if block >= 2048 else 4,
    )  # fmt: skip
    return normed, summed


@triton.jit
def _rotary_kernel(
    query, key, cos, sin, query_weight, key_weight, query_out, key_out, query_stride, key_stride, eps,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = DIM // 2
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at = tl.arange(0, half)
    is_query = head < Q_HEADS
    is_key = (head >= Q_HEADS) & (head < Q_HEADS + K_HEADS)
    in_query = is_query[:, None] & (at < half)[None, :]
    in_key = is_key[:, None] & (at < half)[None, :]
    from_query = query + row * query_stride + head[:, None] * DIM + at[None, :]
    from_key = key + row * key_stride + (head - Q_HEADS)[:, None] * DIM + at[None, :]
    low = tl.load(from_query, mask=in_query, other=0.0) + tl.load(from_key, mask=in_key, other=0.0)
    high = tl.load(from_query + half, mask=in_query, other=0.0)
    high += tl.load(from_key + half, mask=in_key, other=0.0)
    dtype = low.dtype
    if NORM:
        wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
        mean = (tl.sum(wide_low * wide_low, 1) + tl.sum(wide_high * wide_high, 1)) / DIM
        scale = tl.rsqrt(mean + eps)[:, None]
        q_low, q_high = tl.load(query_weight + at), tl.load(query_weight + half + at)
        k_low, k_high = tl.load(key_weight + at), tl.load(key_weight + half + at)
        low = tl.where(is_query[:, None], q_low[None, :], k_low[None, :]) * (wide_low * scale).to(dtype)
        high = tl.where(is_query[:, None], q_high[None, :], k_high[None, :]) * (wide_high * scale).to(dtype)
    low, high = low.to(tl.float32), high.to(tl.float32)
    cos_low, cos_high = tl.load(cos + row * DIM + at), tl.load(cos + row * DIM + half + at)
    sin_low, sin_high = tl.load(sin + row * DIM + at), tl.load(sin + row * DIM + half + at)
    new_low = (low * cos_low[None, :] - high * sin_low[None, :]).to(dtype)
    new_high = (high * cos_high[None, :] + low * sin_high[None, :]).to(dtype)
    to_query = query_out + (row * Q_HEADS + head)[:, None] * DIM + at[None, :]
    to_key = key_out + (row * K_HEADS + head - Q_HEADS)[:, None] * DIM + at[None, :]
    tl.store(to_query, new_low, mask=in_query)
    tl.store(to_query + half, new_high, mask=in_query)
    tl.store(to_key, new_low, mask=in_key)
    tl.store(to_key + half, new_high, mask=in_key)


def rotary(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [n, Hq, D], key [n, Hkv, D] with adjacent heads, cos, sin [n, D] -> both rotated, contiguous.

    ``norms``: weights [D] of RMSNorms over each head that come before (Qwen3).
    """
    count, q_heads, dim = query.shape
    k_heads = key.shape[1]
    query_out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    key_out = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    query_weight, key_weight = norms or (cos, cos)
    _rotary_kernel[(count, -(-(q_heads + k_heads) // 8))](
        query, key, cos, sin, query_weight, key_weight, query_out, key_out,
        query.stride(0), key.stride(0), eps,
        Q_HEADS=q_heads, K_HEADS=k_heads, DIM=dim, HEADS=8, NORM=norms is not None, num_warps=4,
    )  # fmt: skip
    return query_out, key_out


@triton.jit
def _silu_times_kernel(gate, up, out, gate_stride, up_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(x.dtype)
    tl.store(
        out + row * width + at, silu * tl.load(up + row * up_stride + at, mask=inside, other=0.0), mask=inside
    )


def silu_times(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up; both [n, width] with adjacent columns."""
    count, width = gate.shape
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    block = min(2048, 1 << (width - 1).bit_length())
    _silu_times_kernel[(count, -(-width // block))](
        gate, up, out, gate.stride(0), up.stride(0), width, BLOCK=block, num_warps=4
    )
    return out
