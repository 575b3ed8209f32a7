"""Storing one new token a request in head-split pages."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rlkv.kernels import check_device
from rlkv.window import Window


@triton.jit(
    do_not_specialize=["sink", "recent", "kv_heads", "table_stride_n", "table_stride_h", "full_stride_n"],
    do_not_specialize_on_alignment=["table", "positions", "full", "scales"],
)
def store_kernel(
    key,  # [n, kv_heads, DIM], any strides of n and heads
    value,
    keys,  # [pages, PAGE, DIM]
    values,
    table,  # int32 [n, kv_heads, most pages of a row]
    positions,  # int [n], negative for none
    full,  # bool [n or 1, kv_heads]
    scales,  # float32 [2, kv_heads], SCALED only
    sink,
    recent,
    kv_heads,
    key_stride_n,
    key_stride_h,
    value_stride_n,
    value_stride_h,
    table_stride_n,
    table_stride_h,
    full_stride_n,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    SCALED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One request's new token: full heads at its position, local heads at its place in the ring."""
    if EARLY:
        gdc_launch_dependents()
    request = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + request).to(tl.int32)
    head = tl.arange(0, HEADS)
    there = head < tl.where(position >= 0, kv_heads, 0)
    is_full = tl.load(full + request * full_stride_n + head, mask=there, other=0) != 0
    ring = tl.where(position < sink, position, sink + (position - sink) % recent)
    slot = tl.where(is_full, position, ring)
    where = request * table_stride_n + head * table_stride_h + slot // PAGE
    page = tl.load(table + where, mask=there, other=0).to(tl.int64)
    at_dim = tl.arange(0, DIM)[None, :]
    inside = there[:, None] & (at_dim < DIM)
    if EARLY:  # so far nothing was read that the kernel before this one may have written
        gdc_wait()
    new_key = tl.load(
        key + request * key_stride_n + head[:, None] * key_stride_h + at_dim, mask=inside, other=0.0
    )
    new_value = tl.load(
        value + request * value_stride_n + head[:, None] * value_stride_h + at_dim, mask=inside, other=0.0
    )
    if SCALED:
        new_key = new_key / tl.load(scales + head, mask=there, other=1.0)[:, None]
        new_value = new_value / tl.load(scales + kv_heads + head, mask=there, other=1.0)[:, None]
    cell = (page * PAGE + slot % PAGE)[:, None] * DIM + at_dim
    tl.store(keys + cell, new_key.to(keys.dtype.element_ty), mask=inside)
    tl.store(values + cell, new_value.to(values.dtype.element_ty), mask=inside)


@cache
def overlaps_launches(device: torch.device) -> bool:
    """Whether a kernel can begin there while the one before ends: programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    full: torch.Tensor,
    window: Window,
    scales: torch.Tensor | None = None,
    early: bool = False,
) -> None:
    """Put one token a request into its pages: ``key``, ``value`` [n, kv_heads, D] at ``positions`` int [n].

    Full heads (``full`` bool [kv_heads] or [n, kv_heads]) store it at its position, local heads at its place
    in the ring; a negative position stores nothing. The rest is as in
    :meth:`rlkv.kernels.decode.PagedDecoder.attend`. ``early``: begin, where the GPU can, while
    the kernel before ends, which then must not be the one that makes ``positions``, ``table`` or ``full``.
    """
    check_device(key, value, keys, values, table)
    count, heads, dim = key.shape
    early = early and overlaps_launches(key.device)
    full = full.view(-1, heads)
    store_kernel[(count,)](
        key,
        value,
        keys,
        values,
        table,
        positions,
        full,
        positions if scales is None else scales,
        window.sink,
        window.recent,
        heads,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        table.stride(0),
        table.stride(1),
        full.stride(0) if len(full) > 1 else 0,
        HEADS=1 << (heads - 1).bit_length(),
        PAGE=keys.shape[1],
        DIM=dim,
        SCALED=scales is not None,
        EARLY=early,
        launch_pdl=early,
        num_warps=4,
    )
