"""Local heads by machine: a decoding step (store the new token, attend to the ring), and prompts.

What depends on the batch alone is prepared once a step, with static shapes and no host, so that a CUDA graph
can hold it.
"""

from __future__ import annotations

from typing import Protocol

import torch

from rlkv.serving.decode import decode_local
from rlkv.serving.extend import Causal
from rlkv_sglang.pool import HeadwiseKVPool


class DecodeStep(Protocol):
    """One decoding step of a layer, up to the attention of its full heads."""

    def prepare(self, request: torch.Tensor, length: torch.Tensor, rows: torch.Tensor) -> None:
        """Request slots [B], lengths [B], the new token included, and its rows [B] among full heads'."""
        ...

    def run(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        scaling: float,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """Store the new tokens, attend local heads, and give the queries of full heads [B, n * D].

        query, output [B, heads * groups, D], key and value [B, heads, D]; full heads come first.
        """
        ...


class TorchStep:
    """Plain PyTorch, on any device."""

    def __init__(self, pool: HeadwiseKVPool) -> None:
        self.pool = pool

    def prepare(self, request: torch.Tensor, length: torch.Tensor, rows: torch.Tensor) -> None:
        slots = self.pool.slots
        self.rows, self.new = rows, slots.ring(request, length - 1)
        self.held, self.filled = slots.held(request, length)

    def run(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        scaling: float,
        output: torch.Tensor,
    ) -> torch.Tensor:
        keys, values = self.pool.full(layer)
        full = keys.shape[1]
        queries = full * (query.shape[1] // key.shape[1])
        keys[self.rows], values[self.rows] = key[:, :full].to(keys.dtype), value[:, :full].to(keys.dtype)
        if full < key.shape[1]:
            keys, values = self.pool.local(layer)
            keys[self.new], values[self.new] = key[:, full:].to(keys.dtype), value[:, full:].to(keys.dtype)
            local = decode_local(query[:, queries:], keys, values, self.held, self.filled, scaling)
            output[:, queries:] = local
        return query[:, :queries].flatten(1)


class TritonStep:
    """Our Triton kernel, one launch; nothing is prepared."""

    def __init__(self, pool: HeadwiseKVPool) -> None:
        from rlkv.kernels.ring import decode_step

        self.pool, self.kernel = pool, decode_step

    def prepare(self, request: torch.Tensor, length: torch.Tensor, rows: torch.Tensor) -> None:
        self.request, self.length, self.rows = request, length, rows

    def run(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        scaling: float,
        output: torch.Tensor,
    ) -> torch.Tensor:
        full, ring, window = self.pool.full(layer), self.pool.local(layer), self.pool.slots.window
        requests = (self.request, self.length, window)
        return self.kernel(query, key, value, full, self.rows, ring, *requests, scaling, output)


def decode_step(pool: HeadwiseKVPool) -> DecodeStep:
    """The fastest that the machine has."""
    return TritonStep(pool) if torch.device(pool.device).type == "cuda" else TorchStep(pool)


def causal_kernel(name: str) -> Causal | None:
    """The kernel for prompts that goes with SGLang's backend ``name``; None: PyTorch's."""
    if name != "fa3":
        return None
    from sgl_kernel.flash_attn import flash_attn_varlen_func

    def causal(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_edges: torch.Tensor,
        key_edges: torch.Tensor,
        longest_query: int,
        longest_key: int,
        scaling: float,
    ) -> torch.Tensor:
        states = (tensor.contiguous() for tensor in (query, key, value))
        output: torch.Tensor = flash_attn_varlen_func(
            *states, query_edges, key_edges, longest_query, longest_key, softmax_scale=scaling, causal=True
        )
        return output

    return causal
