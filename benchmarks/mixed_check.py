"""Is the mixed attention kernel that is about to be timed right? Random packings against float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_timing import print_table, relative_error, require

from rlkv.attention.chunked import mixed_chunked
from rlkv.attention.reference import mixed_attention as reference
from rlkv.kernels import mixed
from rlkv.window import Window

NAMES = ("output", "query", "key", "value", "gates")


def make_inputs(lengths: Sequence[int], heads: tuple[int, int], dim: int) -> list[torch.Tensor]:
    """Query [T, Hq, D], key, value [T, Hkv, D] and gates [Hkv], all wanting gradients."""
    total = sum(lengths)
    shapes = [(total, heads[0], dim), (total, heads[1], dim), (total, heads[1], dim)]
    states = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]
    return [part.requires_grad_() for part in [*states, torch.rand(heads[1], device="cuda")]]


def per_sequence(
    attend: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], lengths: Sequence[int]
) -> torch.Tensor:
    """``attend(query, key, value, gates)`` in transformers' layout on each sequence; [T, Hq, D]."""
    parts = [part.split(list(lengths)) for part in inputs[:3]]
    found = [
        attend(*(part.transpose(0, 1)[None] for part in row), inputs[3]) for row in zip(*parts, strict=True)
    ]
    return torch.cat([part[0].transpose(0, 1) for part in found])


def exact(window: Window, dim: int) -> Callable[..., torch.Tensor]:
    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gates: torch.Tensor
    ) -> torch.Tensor:
        at = torch.arange(query.shape[2], device=query.device)
        full, local = at <= at[:, None], window.sees(at[:, None], at)
        return reference(query, key, value, gates, full[None, None], local[None, None], dim**-0.5)

    return attend


def errors_of(
    lengths: Sequence[int], window: Window, heads: tuple[int, int], dim: int, tuning: Any
) -> dict[str, Any]:
    """Relative errors of output and gradients: ours, and PyTorch's fused attention for both branches.

    The first head's gate is exactly 0, and skipped; the second's is exactly 1.
    """
    inputs = make_inputs(lengths, heads, dim)
    with torch.no_grad():
        inputs[3][0], inputs[3][1] = 0, 1
    gradient = torch.randn_like(inputs[0])
    wide = [part.detach().float().requires_grad_() for part in inputs]
    right = per_sequence(exact(window, dim), wide, lengths)
    wanted = [right, *torch.autograd.grad(right, wide, gradient.float())]
    ours = mixed.mixed_attention(*inputs, lengths, window, dim**-0.5, closed=(0,), tuning=tuning)
    found = [ours, *torch.autograd.grad(ours, inputs, gradient)]
    theirs = per_sequence(lambda *x: mixed_chunked(*x, window, dim**-0.5), inputs, lengths)
    other = [theirs, *torch.autograd.grad(theirs, inputs, gradient)]
    result: dict[str, Any] = {}
    for name, ours_, theirs_, right_ in zip(NAMES, found, other, wanted, strict=True):
        result[name] = (relative_error(ours_, right_), relative_error(theirs_, right_))
    return result


def check(heads: tuple[int, int], dim: int, tuning: Any) -> list[dict[str, Any]]:
    """A row for each packing and result; raises RLKVError if ours is worse than 1.5 times PyTorch's error."""
    rows: list[dict[str, Any]] = []
    for lengths, window in (
        ([1500], Window(128, 256)),
        ([777, 777], Window(16, 64)),
        ([900, 60, 1, 1300], Window(64, 100)),
        ([400, 300], Window(128, 256)),
    ):
        packing = {"lengths": "+".join(map(str, lengths)), "window": str(window)}
        for name, (ours, theirs) in errors_of(lengths, window, heads, dim, tuning).items():
            rows.append({**packing, "relative error of": name, "ours": ours, "PyTorch's bf16": theirs})
            require(ours, min(2e-2, 1.5 * theirs), f"{lengths} {window} {name}")
    print_table(rows)
    return rows
