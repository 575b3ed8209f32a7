"""Soft gates: every head attends fully and to its window, and the outputs are mixed; one ordinary KV pool.

For rollouts of gate training: nothing is saved. The gates are a buffer of the model that is changed in place
by any of SGLang's ways to update weights, under the name ``rlkv.gates``; gates.py does so while requests run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from sglang.srt.runtime_context import get_parallel

from rlkv.errors import RLKVError
from rlkv.mask import HeadMask
from rlkv.serving.decode import decode_local
from rlkv.serving.extend import Extend
from rlkv.serving.slots import Slots, Staging
from rlkv_sglang.announced import Announced, teach
from rlkv_sglang.gates import NAME
from rlkv_sglang.hooks import Serving


def make_gates(serving: Serving) -> torch.Tensor:
    """Float32 [layers, kv_heads] on the current device: the gates folder's, or a mask's zeros and ones."""
    settings, shape = serving.settings, serving.plan.shape
    values = settings.head_gates(shape).values if settings.gates else HeadMask.load(settings.mask).gates()
    return values.to(torch.get_default_device(), copy=True)


def without_gates(
    serving: Serving, weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights for the model; what is called ``rlkv.gates`` goes into ``serving.gates`` instead, in place.

    Raises RLKVError for gates that don't fit; if ``weights`` is a list, before anything of it is given out.
    """
    gates = serving.gates
    assert gates is not None
    if isinstance(weights, list):
        for name, tensor in weights:
            if name == NAME:
                check_gates(gates, tensor)
    for name, tensor in weights:
        if name == NAME:
            check_gates(gates, tensor)
            set_gates(gates, tensor)
        else:
            yield name, tensor


def check_gates(gates: torch.Tensor, new: torch.Tensor) -> None:
    """Raise RLKVError unless ``new`` can take the place of ``gates`` [layers, kv_heads]."""
    if new.shape != gates.shape:
        raise RLKVError(f"{NAME} must be of shape {list(gates.shape)}; got {list(new.shape)}")
    if not new.isfinite().all():
        raise RLKVError(f"{NAME} must be finite")


def set_gates(gates: torch.Tensor, new: torch.Tensor) -> None:
    """In place; a step that is still under way on a GPU ends with the gates that it began with."""
    if gates.is_cuda:
        torch.cuda.synchronize(gates.device)
    gates.copy_(new.clamp(0, 1))
    if gates.is_cuda:
        torch.cuda.synchronize(gates.device)


@dataclass(frozen=True, eq=False)
class PoolSlots(Slots):
    """Where SGLang's own pool holds a request's tokens (``table`` [request slots, positions])."""

    table: torch.Tensor = field(kw_only=True)

    def ring(self, request: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Row of a token, on the device of ``position``."""
        device = self.table.device
        return self.table[request.to(device), position.to(device)].long().to(position.device)

    def held(self, request: torch.Tensor, length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [B, size] of the window's tokens, and which there are; the others are the request's first."""
        positions = self.window.held_positions(length.long()[:, None] - 1)
        return self.ring(request[:, None], positions.clamp(min=0)), positions >= 0


class GatedBackend(Announced):
    """Mixed in before a class of SGLang; ``_attach`` is its constructor."""

    _slots: PoolSlots
    _gates: torch.Tensor  # float32 [layers, heads of this rank], a view of the tensor that is updated
    _extend: Extend | None
    _prompt: torch.Tensor  # bool [T, 1, 1]: new tokens that attend fully
    _rows: torch.Tensor
    _filled: torch.Tensor

    def _attach(self, runner: Any, serving: Serving) -> None:
        assert serving.gates is not None
        requests, plan = runner.req_to_token_pool, serving.plan
        self._pool = runner.token_to_kv_pool
        self._slots = PoolSlots(plan.window, requests.size, table=requests.req_to_token)
        heads = plan.shape.kv_heads // plan.tp
        first = get_parallel().attn_tp_rank * heads
        self._gates = serving.gates[:, first : first + heads]
        self._extend = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        self._extend = None
        if forward_batch.forward_mode.is_extend():
            chunks, device = self.announced(forward_batch), forward_batch.out_cache_loc.device
            windowed = [replace(chunk, exempt=0) for chunk in chunks]
            self._extend = Extend(self._slots, Staging(0), windowed, device)
            prompt = [torch.arange(chunk.start, chunk.stop) < chunk.exempt for chunk in chunks]
            self._prompt = torch.cat(prompt)[:, None, None].to(device)
        elif forward_batch.forward_mode.is_decode():
            self._find_window(forward_batch)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        super().init_forward_metadata_in_graph(forward_batch)
        if forward_batch.forward_mode.is_decode():
            self._find_window(forward_batch)

    def _find_window(self, forward_batch: Any) -> None:
        held = self._slots.held(forward_batch.req_pool_indices, forward_batch.seq_lens)
        self._rows, self._filled = held

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
        """q [T, heads * groups * D], k and v [T, heads, D]; the same shape as q comes back."""
        whole = super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **options)
        full = whole.view(len(q), -1, layer.head_dim)
        local, extend = torch.empty_like(full), self._extend
        assert extend is not None
        query = q.reshape(full.shape)
        keys, values = self._pool.get_kv_buffer(layer.layer_id)
        extend.attend(query, k, v, keys, values, layer.scaling, local)
        gate = torch.where(self._prompt, 1.0, self._gate(layer))
        return self._mix(gate, full, local)

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
        whole = super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **options)
        full = whole.view(len(q), -1, layer.head_dim)
        keys, values = self._pool.get_kv_buffer(layer.layer_id)
        query = q.reshape(full.shape)
        local = decode_local(query, keys, values, self._rows, self._filled, layer.scaling)
        return self._mix(self._gate(layer), full, local)

    def _gate(self, layer: Any) -> torch.Tensor:
        """[1, query heads, 1]."""
        groups = layer.tp_q_head_num // layer.tp_k_head_num
        return self._gates[layer.layer_id].repeat_interleave(groups)[None, :, None]

    def _mix(self, gate: torch.Tensor, full: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        return (gate * full + (1 - gate) * local).to(full.dtype).flatten(1)


def teach_gates(backend: Any, runner: Any, serving: Serving) -> Any:
    """Turn an attention backend of SGLang into one with soft gates."""
    teach(backend, GatedBackend)._attach(runner, serving)
    return backend
