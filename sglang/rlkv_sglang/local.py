"""Local heads by machine: decoding (store the new token in its ring, attend to the ring), and prompts.

What depends on the batch alone is prepared once a step, with static shapes and no host, so that a CUDA graph
can hold it.
"""

from __future__ import annotations

from typing import Protocol

import torch

from rlkv.serving.decode import decode_local
from rlkv.serving.extend import Causal
from rlkv_sglang.pool import HeadwiseKVPool


class LocalDecode(Protocol):
    """One decoding step of local heads."""

    def prepare(self, request: torch.Tensor, length: torch.Tensor) -> None:
        """Request slots [B] and lengths [B], the new token included."""
        ...

    def decode(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        output: torch.Tensor,
    ) -> None:
        """query, output [B, heads * groups, D], key and value [B, heads, D]; keys, values: a layer's pool."""
        ...


class TorchDecode:
    """Plain PyTorch, on any device."""

    def __init__(self, pool: HeadwiseKVPool) -> None:
        self.slots = pool.slots

    def prepare(self, request: torch.Tensor, length: torch.Tensor) -> None:
        self.row = self.slots.ring(request, length - 1)
        self.rows, self.filled = self.slots.held(request, length)

    def decode(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        output: torch.Tensor,
    ) -> None:
        keys[self.row], values[self.row] = key.to(keys.dtype), value.to(values.dtype)
        output.copy_(decode_local(query, keys, values, self.rows, self.filled, scaling))


class RingDecode:
    """Our Triton kernel, one launch that stores and attends; nothing is prepared."""

    def __init__(self, pool: HeadwiseKVPool) -> None:
        from rlkv.kernels.ring import ring_decode

        self.kernel, self.window = ring_decode, pool.slots.window

    def prepare(self, request: torch.Tensor, length: torch.Tensor) -> None:
        self.request, self.length = request, length

    def decode(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        output: torch.Tensor,
    ) -> None:
        self.kernel(query, key, value, keys, values, self.request, self.length, self.window, scaling, output)


def local_decode(pool: HeadwiseKVPool) -> LocalDecode:
    """The fastest that the machine has."""
    return RingDecode(pool) if torch.device(pool.device).type == "cuda" else TorchDecode(pool)


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
