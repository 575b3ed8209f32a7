"""The small steps between matrix products, one launch each: residual + RMSNorm, rotary, SiLU times up.

Numbers are rounded where transformers rounds them, except inside the rotary embedding and in the backward
passes, which are float32. The models' own weights are frozen: they get no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from rlkv.kernels.elementwise_kernels import (
    add_norm_gradient_kernel,
    add_norm_kernel,
    rotary_kernel,
    silu_times_gradient_kernel,
    silu_times_kernel,
)


def add_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual [n, width] -> (RMSNorm(x + residual) * weight, x + residual); no residual: of x itself."""
    if residual is None:
        return _AddNorm.apply(x, None, weight, eps), x
    return _AddNorm.apply(x, residual, weight, eps)


def _row_launch(width: int) -> dict[str, int]:
    block = 1 << (width - 1).bit_length()
    return {"BLOCK": block, "num_warps": 8 if block >= 2048 else 4}


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, residual, weight, eps):
        ctx.set_materialize_grads(False)
        x = x.contiguous()
        normed = torch.empty_like(x)
        summed = x if residual is None else torch.empty_like(x)
        add_norm_kernel[(len(x),)](
            x, x if residual is None else residual, weight, normed, summed, eps, x.shape[1],
            ADD=residual is not None, **_row_launch(x.shape[1]),
        )  # fmt: skip
        ctx.save_for_backward(summed, weight)
        ctx.eps = eps
        return normed if residual is None else (normed, summed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_normed, grad_summed=None):
        summed, weight = ctx.saved_tensors
        grad, past = torch.empty_like(summed), grad_summed is not None
        grad_normed = grad_normed.contiguous()
        add_norm_gradient_kernel[(len(summed),)](
            grad_normed, grad_summed.contiguous() if past else grad_normed, summed, weight, grad, ctx.eps,
            summed.shape[1], ADD=past, **_row_launch(summed.shape[1]),
        )  # fmt: skip
        return grad, grad if ctx.needs_input_grad[1] else None, None, None


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
    if not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)):
        return _rotate(query, key, cos, sin, norms, eps)
    if norms is not None:  # a launch each, whose backward pass we have
        query, key = (
            add_norm(part.reshape(-1, part.shape[-1]), None, weight, eps)[0].view(part.shape)
            for part, weight in zip((query, key), norms, strict=True)
        )
    return _Rotary.apply(query, key, cos, sin)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query, key, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(query, key, cos, sin, None, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_query, grad_key):
        cos, sin = ctx.saved_tensors  # to turn back is to turn by the opposite angle
        return *_rotate(grad_query.contiguous(), grad_key.contiguous(), cos, -sin, None, 0.0), None, None


def _rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norms: Any, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    count, q_heads, dim = query.shape
    k_heads = key.shape[1]
    query_out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    key_out = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    query_weight, key_weight = norms or (cos, cos)
    rotary_kernel[(count, -(-(q_heads + k_heads) // 8))](
        query, key, cos, sin, query_weight, key_weight, query_out, key_out,
        query.stride(0), key.stride(0), eps,
        Q_HEADS=q_heads, K_HEADS=k_heads, DIM=dim, HEADS=8, NORM=norms is not None, num_warps=4,
    )  # fmt: skip
    return query_out, key_out


def silu_times(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up [n, width] of gate and up side by side [n, 2 * width]."""
    return _SiluTimes.apply(gate_up)


class _SiluTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up):
        gate_up = gate_up.contiguous()
        count, width = len(gate_up), gate_up.shape[1] // 2
        out = torch.empty(count, width, dtype=gate_up.dtype, device=gate_up.device)
        block = min(2048, 1 << (width - 1).bit_length())
        silu_times_kernel[(count, -(-width // block))](gate_up, out, width, BLOCK=block, num_warps=4)
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out):
        (gate_up,) = ctx.saved_tensors
        grad, width = torch.empty_like(gate_up), grad_out.shape[1]
        block = min(2048, 1 << (width - 1).bit_length())
        silu_times_gradient_kernel[(len(gate_up), -(-width // block))](
            grad_out.contiguous(), gate_up, grad, width, BLOCK=block, num_warps=4
        )
        return grad
