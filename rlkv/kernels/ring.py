"""One decoding step of a layer whose full heads come first, in one launch before the attention of full heads.

A program is one (request, KV head). A full head's stores the new token in its row and gathers the queries; a
local head's stores the token in its ring and attends to the ring. A window is some hundred tokens at most, so
nothing is split, nothing is prepared beforehand, and every launch parameter is static: a captured CUDA graph
reads rows, request slots and lengths from the tensors that it was given. ``store_rows`` writes full heads of
prompts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlkv.window import Window

LOG2_E = 1.4426950408889634


@triton.jit
def decode_step_kernel(
    query,
    key,
    value,
    full_keys,
    full_values,
    full_query,
    rows,
    keys,
    values,
    output,
    request,
    length,
    full,
    scale,
    query_token,
    query_head,
    key_token,
    key_head,
    value_token,
    value_head,
    full_token,
    full_head,
    gathered_token,
    pool_token,
    pool_head,
    output_token,
    output_head,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, BLOCK_D)
    groups = tl.arange(0, BLOCK_G)
    inside = dims < DIM
    mine = (groups < GROUPS)[:, None] & inside[None, :]
    query_heads = (head * GROUPS + groups)[:, None]
    q = tl.load(query + row * query_token + query_heads * query_head + dims[None, :], mask=mine, other=0.0)
    k = tl.load(key + row * key_token + head * key_head + dims, mask=inside, other=0.0)
    v = tl.load(value + row * value_token + head * value_head + dims, mask=inside, other=0.0)
    if head < full:
        new = tl.load(rows + row).to(tl.int64) * full_token + head * full_head + dims
        tl.store(full_keys + new, k, mask=inside)
        tl.store(full_values + new, v, mask=inside)
        tl.store(full_query + row * gathered_token + query_heads * DIM + dims[None, :], q, mask=mine)
    else:
        local = head - full
        count = tl.load(length + row).to(tl.int32)
        base = tl.load(request + row).to(tl.int64) * (SINK + RECENT)
        position = count - 1
        slot = tl.where(position < SINK, position, SINK + (position - SINK) % RECENT)
        place = (base + slot) * pool_token + local * pool_head + dims
        tl.store(keys + place, k, mask=inside)
        tl.store(values + place, v, mask=inside)

        # the new token is attended from registers, the others from the ring
        top = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], axis=1) * scale
        total = tl.full([BLOCK_G], 1.0, tl.float32)
        mixed = tl.zeros([BLOCK_G, BLOCK_D], tl.float32) + v.to(tl.float32)[None, :]
        held = tl.minimum(count, SINK + RECENT)
        for start in range(0, held, BLOCK_N):
            tokens = start + tl.arange(0, BLOCK_N)
            seen = (tokens < held) & (tokens != slot)
            ring_rows = (base + tokens)[:, None] * pool_token + local * pool_head + dims[None, :]
            wanted = seen[:, None] & inside[None, :]
            ring_k = tl.load(keys + ring_rows, mask=wanted, other=0.0)
            ring_v = tl.load(values + ring_rows, mask=wanted, other=0.0)
            scores = tl.dot(q, tl.trans(ring_k), input_precision="ieee") * scale
            scores = tl.where(seen[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            shrink = tl.exp2(top - new_top)
            weights = tl.exp2(scores - new_top[:, None])
            total = total * shrink + tl.sum(weights, axis=1)
            mixed = mixed * shrink[:, None]
            mixed += tl.dot(weights.to(ring_v.dtype), ring_v, input_precision="ieee")
            top = new_top
        place_out = output + row * output_token + query_heads * output_head + dims[None, :]
        tl.store(place_out, (mixed / total[:, None]).to(output.dtype.element_ty), mask=mine)


@triton.jit
def store_rows_kernel(
    key,
    value,
    keys,
    values,
    rows,
    key_token,
    key_head,
    value_token,
    value_head,
    pool_token,
    pool_head,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, BLOCK_D)
    inside = dims < DIM
    place = tl.load(rows + token).to(tl.int64) * pool_token + head * pool_head + dims
    k = tl.load(key + token * key_token + head * key_head + dims, mask=inside)
    v = tl.load(value + token * value_token + head * value_head + dims, mask=inside)
    tl.store(keys + place, k, mask=inside)
    tl.store(values + place, v, mask=inside)


def decode_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    full: tuple[torch.Tensor, torch.Tensor],
    rows: torch.Tensor,
    ring: tuple[torch.Tensor, torch.Tensor],
    request: torch.Tensor,
    length: torch.Tensor,
    window: Window,
    scaling: float,
    output: torch.Tensor,
) -> torch.Tensor:
    """Store one token a request and attend its local heads; gives the full heads' queries, contiguous.

    query, output [B, heads * groups, D], of which the output of local heads is written; key, value [B, heads,
    D]. Keys and values of the layer's pools: ``full`` [rows, full heads, D], where ``rows`` int [B] are the
    new tokens', and ``ring`` [rows, local heads, D]; request, length int [B]: whose ring
    (:class:`rlkv.serving.slots.Slots`) and its tokens, the new one included. One dtype; any strides but that
    of D, which is 1. Returns [B, full heads * groups * D].
    """
    heads, dim = key.shape[1:]
    groups, kept = query.shape[1] // heads, full[0].shape[1]
    assert all(k.stride() == v.stride() and k.dtype == v.dtype == key.dtype for k, v in (full, ring))
    gathered = query.new_empty(len(query), kept * groups * dim)
    decode_step_kernel[(len(query), heads)](
        query,
        key,
        value,
        *full,
        gathered,
        rows,
        *ring,
        output,
        request,
        length,
        kept,
        scaling * LOG2_E,
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        *full[0].stride()[:2],
        gathered.stride(0),
        *ring[0].stride()[:2],
        *output.stride()[:2],
        SINK=window.sink,
        RECENT=window.recent,
        GROUPS=groups,
        DIM=dim,
        BLOCK_G=max(16, triton.next_power_of_2(groups)),
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BLOCK_N=min(64, max(16, triton.next_power_of_2(window.size))),
        num_warps=4,
    )
    return gathered


def store_rows(
    key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor
) -> None:
    """``keys[rows] = key`` and ``values[rows] = value`` in one launch; shapes as in :func:`decode_step`."""
    tokens, heads, dim = key.shape
    assert keys.stride() == values.stride() and keys.dtype == key.dtype
    if tokens:
        store_rows_kernel[(tokens, heads)](
            key,
            value,
            keys,
            values,
            rows,
            *key.stride()[:2],
            *value.stride()[:2],
            *keys.stride()[:2],
            DIM=dim,
            BLOCK_D=triton.next_power_of_2(dim),
        )
