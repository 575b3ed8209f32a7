"""A debugging aid: memory that a request gives back is filled with NaN, so that no one can read it unseen."""

from __future__ import annotations

from typing import Any

import torch

from rlkv_sglang.pool import HeadwiseKVPool


def poison(pool: HeadwiseKVPool, requests: Any, allocator: Any) -> None:
    """Make both of SGLang's allocators fill what is freed; the padding row and ring stay as they are."""
    free_request, free_tokens = requests.free, allocator.free
    size = pool.slots.window.size

    def free_ring(request: Any) -> None:
        start = request.req_pool_idx * size
        for buffer in (*pool.local_k, *pool.local_v):
            buffer[start : start + size] = torch.nan
        free_request(request)

    def free_rows(rows: torch.Tensor) -> None:
        for buffer in (*pool.k_buffer, *pool.v_buffer):
            buffer[rows] = torch.nan
        free_tokens(rows)

    requests.free, allocator.free = free_ring, free_rows
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        buffer[1:] = torch.nan
    for buffer in (*pool.local_k, *pool.local_v):
        buffer[size:] = torch.nan
