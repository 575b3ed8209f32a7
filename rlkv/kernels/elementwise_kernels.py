"""The device code of ``elementwise.py``, forward and backward: a program a row, or a part of one."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_norm_kernel(
    x, residual, weight, normed, summed, eps, width,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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


@triton.jit
def rotary_kernel(
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


@triton.jit
def silu_times_kernel(gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(gate_up + row * 2 * width + at, mask=inside, other=0.0)
    up = tl.load(gate_up + (row * 2 + 1) * width + at, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(x.dtype)
    tl.store(out + row * width + at, silu * up, mask=inside)


@triton.jit
def add_norm_gradient_kernel(
    grad_normed, grad_summed, summed, weight, grad, eps, width, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    """Of x + residual, through the norm and (ADD) past it; the norm's scale is computed again."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(summed + row * width + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    x = x * scale
    slope = tl.load(grad_normed + row * width + at, mask=inside, other=0.0).to(tl.float32)
    slope = slope * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    slope = scale * (slope - x * (tl.sum(slope * x, 0) / width))
    if ADD:
        slope += tl.load(grad_summed + row * width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad + row * width + at, slope.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def silu_times_gradient_kernel(grad_out, gate_up, grad, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    slope = tl.load(grad_out + row * width + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * width + at, mask=inside, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-gate))
    dtype = grad.dtype.element_ty
    of_gate = slope * up * share * (1.0 + gate * (1.0 - share))
    tl.store(grad + row * 2 * width + at, of_gate.to(dtype), mask=inside)
    tl.store(grad + (row * 2 + 1) * width + at, (slope * gate * share).to(dtype), mask=inside)
