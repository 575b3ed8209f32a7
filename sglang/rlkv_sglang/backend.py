"""The attention backend: SGLang's own for full heads, as it is, and local heads beside it.

A layer's query and KV heads come in the plan's order, full heads first (its weights are permuted), so the two
kinds are slices. A class is derived from SGLang's backend, so that whatever else SGLang asks of it stays.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from rlkv.errors import RLKVError
from rlkv.serving.extend import Causal, Extend
from rlkv.serving.plan import Plan
from rlkv.serving.slots import Staging
from rlkv_sglang.announced import Announced, teach
from rlkv_sglang.hooks import Serving
from rlkv_sglang.local import DecodeStep, causal_kernel, decode_step
from rlkv_sglang.poison import poison
from rlkv_sglang.pool import HeadwiseKVPool


@dataclass(frozen=True)
class Split:
    """One layer: SGLang's layer object as its full heads alone would have it, and where they end."""

    full_layer: Any
    full: int  # KV heads
    local: int
    queries: int  # query heads of the full ones


class HeadwiseBackend(Announced):
    """Mixed in before a class of SGLang; ``_attach`` is its constructor."""

    _plan: Plan
    _pool: HeadwiseKVPool
    _staging: Staging
    _step: DecodeStep
    _causal: Causal | None
    _splits: dict[int, Split]
    _extend: Extend | None  # of the forward in progress, if it has several tokens a request
    _schedules: dict[int, torch.Tensor]  # FA3's, of the decoding step in progress, by number of full heads

    def _attach(self, runner: Any, serving: Serving) -> None:
        pool = runner.token_to_kv_pool
        if not isinstance(pool, HeadwiseKVPool):
            raise RLKVError(f"attention backend rlkv: SGLang built a {type(pool).__name__}, not our KV pool")
        self._plan, self._pool = serving.plan, pool
        self._staging = Staging(pool.slots.staging)
        self._step = decode_step(pool)
        self._causal = causal_kernel(runner.server_args.attention_backend)
        self._splits = {}
        self._extend = None
        self._schedules = {}

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        self._extend = None
        if forward_batch.forward_mode.is_extend():
            device = forward_batch.out_cache_loc.device
            self._extend = Extend(self._pool.slots, self._staging, self.announced(forward_batch), device)
        elif forward_batch.forward_mode.is_decode():
            self._begin_step(forward_batch)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        super().init_forward_metadata_in_graph(forward_batch)
        if forward_batch.forward_mode.is_decode():
            self._begin_step(forward_batch)

    def _begin_step(self, forward_batch: Any) -> None:
        """What all layers of a decoding step share, from tensors that a CUDA graph keeps."""
        tensors = (forward_batch.req_pool_indices, forward_batch.seq_lens, forward_batch.out_cache_loc)
        self._step.prepare(*tensors)
        if hasattr(super(), "_compute_scheduler_metadata"):
            self._schedules = {full: self._schedule(full) for full in set(self._plan.full_heads) - {0}}

    def _schedule(self, full: int) -> torch.Tensor:
        """FA3's tile schedule for layers of ``full`` heads; its kernel would make one a layer otherwise."""
        metadata, heads = self.forward_metadata, (self.num_attention_heads, self.num_kv_heads)
        self.num_attention_heads, self.num_kv_heads = full * self._plan.groups, full
        longest = metadata.page_table.shape[1]  # what the kernel takes for the longest, page_size being 1
        lengths = metadata.cache_seqlens_int32
        schedule = super()._compute_scheduler_metadata(len(lengths), longest, lengths, metadata.cu_seqlens_q)
        self.num_attention_heads, self.num_kv_heads = heads
        return schedule

    def _compute_scheduler_metadata(self, *arguments: Any) -> None:
        """SGLang's one schedule a step does not fit layers of different numbers of heads."""

    def _split(self, layer: Any) -> Split:
        split = self._splits.get(layer.layer_id)
        if split is None:
            full, local = self._plan.full_heads[layer.layer_id], self._plan.local_heads[layer.layer_id]
            full_layer = copy.copy(layer)
            full_layer.tp_q_head_num = full * self._plan.groups
            full_layer.tp_k_head_num = full_layer.tp_v_head_num = full
            split = Split(full_layer, full, local, full * self._plan.groups)
            self._splits[layer.layer_id] = split
        return split

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **options: Any,
    ) -> torch.Tensor:
        """q [T, heads * groups * D], k and v [T, heads, D] of all heads; the same shape as q comes back."""
        split = self._split(layer)
        query, output = self._begin(q, save_kv_cache, options)
        if split.full:
            full_query = query[:, : split.queries].flatten(1)
            self._full(full_query, k, v, split, output, super().forward_extend, forward_batch)
        if split.local:
            assert self._extend is not None
            self._extend.attend(
                query[: self._extend.tokens, split.queries :],
                k[: self._extend.tokens, split.full :],
                v[: self._extend.tokens, split.full :],
                *self._pool.local(layer.layer_id),
                layer.scaling,
                output[: self._extend.tokens, split.queries :],
                self._causal,
            )
        return output.flatten(1)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **options: Any,
    ) -> torch.Tensor:
        """Shapes as in :meth:`forward_extend`, one token a request."""
        split = self._split(layer)
        query, output = self._begin(q, save_kv_cache, options)
        full_query = self._step.run(query, k, v, layer.layer_id, layer.scaling, output)
        if split.full:
            if self._schedules:
                self.forward_metadata.scheduler_metadata = self._schedules[split.full]
            forward = partial(super().forward_decode, save_kv_cache=False)
            self._full(full_query, k, v, split, output, forward, forward_batch)
        return output.flatten(1)

    def _begin(
        self, q: torch.Tensor, save_kv_cache: bool, options: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        extras = [name for name, value in options.items() if value is not None]
        if extras or not save_kv_cache:
            what = extras[0] if extras else "a kernel that stores keys itself"
            raise RLKVError(f"attention backend rlkv: this model's attention uses {what}, which it can't")
        query = q.reshape(len(q), -1, self._plan.shape.head_dim)
        return query, torch.empty_like(query)

    def _full(
        self,
        query: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        split: Split,
        output: torch.Tensor,
        forward: Any,
        forward_batch: Any,
    ) -> None:
        """SGLang's own attention, on the slice of full heads; query [T, their queries * D]."""
        part = output[:, : split.queries]
        forward_batch._attn_output = part  # FA3 writes there; other backends don't know of it
        attended = forward(
            query,
            k[:, : split.full],
            v[:, : split.full],
            split.full_layer,
            forward_batch,
        )
        forward_batch._attn_output = None
        if attended.data_ptr() != part.data_ptr():
            part.copy_(attended.view(part.shape))


def teach_heads(backend: Any, runner: Any, serving: Serving) -> Any:
    """Turn an attention backend of SGLang into one that serves a head mask."""
    teach(backend, HeadwiseBackend)._attach(runner, serving)
    if serving.settings.poison:
        poison(runner.token_to_kv_pool, runner.req_to_token_pool, runner.token_to_kv_pool_allocator)
    return backend
