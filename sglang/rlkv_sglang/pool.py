"""The KV pool: SGLang's, with as many heads a layer as it has full ones, and the local heads beside."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.mem_cache.memory_pool import KvBufferDesc, MHATokenToKVPool, get_tensor_size_bytes

from rlkv.serving.plan import Capacity, Plan
from rlkv.serving.slots import Slots
from rlkv_sglang.hooks import Serving


class HeadwiseKVPool(MHATokenToKVPool):
    """``k_buffer[layer]`` [tokens + 1, full heads, D] as in SGLang; ``local(layer)`` is the rest.

    Local heads' rows are owned by request slots (``slots``); SGLang's token allocator knows nothing of them.
    """

    def __init__(self, plan: Plan, slots: Slots, size: int, **options: Any) -> None:
        self.plan, self.slots = plan, slots
        super().__init__(size, **options)

    def _create_buffers_normal(self) -> None:
        with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE):
            rows = self.size + self.page_size  # token 0 takes the padding
            self.k_buffer = self._zeros(rows, self.plan.full_heads)
            self.v_buffer = self._zeros(rows, self.plan.full_heads)
            self.local_k = self._zeros(self.slots.rows, self.plan.local_heads)
            self.local_v = self._zeros(self.slots.rows, self.plan.local_heads)

    def _zeros(self, rows: int, heads: tuple[int, ...]) -> list[torch.Tensor]:
        shapes = [(rows, count, self.head_dim) for count in heads]
        return [torch.zeros(shape, dtype=self.store_dtype, device=self.device) for shape in shapes]

    def _build_kv_buffer_descs(self) -> list[KvBufferDesc]:
        return [
            KvBufferDesc(
                f"{kind}{layer}",
                tuple(buffer.shape),
                row_bytes=buffer[0].numel() * buffer.itemsize,
                tokens_per_row=1,
            )
            for kind, buffers in (("k", self.k_buffer), ("v", self.v_buffer))
            for layer, buffer in enumerate(buffers)
        ]

    def _store_kv_layer(
        self, layer_idx: int, loc: torch.Tensor, cache_k: torch.Tensor, cache_v: torch.Tensor
    ) -> None:
        keys, values = self.k_buffer[layer_idx], self.v_buffer[layer_idx]
        if keys.is_cuda:  # SGLang's kernel would be compiled for every number of heads
            from rlkv.kernels.ring import store_rows

            store_rows(cache_k, cache_v, keys, values, loc)
        else:
            keys[loc], values[loc] = cache_k, cache_v

    def full(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer's full heads, each [tokens + 1, full heads, D]."""
        return self.k_buffer[layer], self.v_buffer[layer]

    def local(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer's local heads, each [slots.rows, local heads, D]."""
        return self.local_k[layer], self.local_v[layer]

    def capacity(self) -> Capacity:
        """What was allocated."""
        ring = (self.slots.requests + 1) * self.slots.window.size
        return Capacity(
            self.size,
            self.slots.requests,
            self.slots.staging,
            self.size * self.plan.full_token_bytes,
            ring * self.plan.local_token_bytes,
            self.slots.staging * self.plan.local_token_bytes,
        )

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Of keys and of values, windows included."""
        k_size, v_size = super().get_kv_size_bytes()
        return k_size + get_tensor_size_bytes(self.local_k), v_size + get_tensor_size_bytes(self.local_v)


def build_pool(configurator: Any, serving: Serving, slots: Slots, tokens: int) -> HeadwiseKVPool:
    """The pool that SGLang's configurator asks for."""
    shape = serving.plan.shape
    return HeadwiseKVPool(
        serving.plan,
        slots,
        tokens,
        page_size=configurator.pool_page_size,
        dtype=configurator.kv_cache_dtype,
        head_num=shape.kv_heads // serving.plan.tp,
        head_dim=shape.head_dim,
        layer_num=shape.layers,
        device=configurator.device,
        enable_memory_saver=configurator.server_args.enable_memory_saver,
        start_layer=0,
        end_layer=shape.layers,
        enable_alt_stream=True,
        enable_kv_cache_copy=False,
    )
