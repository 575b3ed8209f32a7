"""The sampler's cache: one row of keys and values a slot, each slot at its own position.

A row holds every token of its request (soft gates need them all); what a slot sees is decided by its own
position alone, so neither padding nor a slot's former owner can be seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from transformers.cache_utils import Cache

from rlkv.attention import Layout
from rlkv.attention.chunked import causal_attention, mixed_chunked
from rlkv.window import Window

Prefill = Literal["local", "full"]
Span = tuple[int, int, int]  # slots from, slots to, columns: these slots attend over their first columns only


class SlotCache(Cache):
    """``decode`` or ``prompt`` says what the next forward is.

    A layer holds values [slots, kv_heads, max_length, head_dim] and, the other way round, keys [slots,
    kv_heads, head_dim, max_length]: with few queries a head, both products then run along memory.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        *,
        slots: int,
        max_length: int,
        window: Window,
        prefill: Prefill,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(layers=[])
        self.window, self.prefill, self.max_length = window, prefill, max_length
        heads = (slots, kv_heads)
        zeros = partial(torch.zeros, dtype=dtype, device=device)
        self.keys = [zeros(*heads, head_dim, max_length) for _ in range(layers)]
        self.values = [zeros(*heads, max_length, head_dim) for _ in range(layers)]
        self._pass: DecodePass | PromptPass | None = None

    def decode(self, positions: torch.Tensor, spans: Sequence[Span], gates: torch.Tensor | None) -> None:
        """The next forward is one token a slot: slot i at ``positions[i]`` (int64 [n]).

        ``spans`` divide the n slots; slots that matter are at positions below their span's columns, others
        give some finite output. ``gates`` float32 [n, layers, kv_heads]; None when every head is full.
        """
        self._pass = DecodePass(self, positions, spans, gates)

    def prompt(self, slots: torch.Tensor, gates: torch.Tensor | None) -> None:
        """The next forward is the right-padded prompts of ``slots`` (int64 [n]) from position 0."""
        self._pass = PromptPass(self, slots, None if self.prefill == "full" else gates)

    def clear(self, slots: torch.Tensor) -> None:
        """Forget what ``slots`` (int64 [n]) held: hidden cells enter the products too and must be finite."""
        for states in (*self.keys, *self.values):
            states[slots] = 0

    def move(self, source: torch.Tensor, target: torch.Tensor, length: int) -> None:
        """Copy the first ``length`` tokens of rows ``source`` to ``target`` (int64 [n]); reads come first."""
        for keys, values in zip(self.keys, self.values, strict=True):
            keys[target, :, :, :length] = keys[source, :, :, :length]
            values[target, :, :length] = values[source, :, :length]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """key_states, value_states [n, kv_heads, T, D] -> the handle that stores them and attends, twice."""
        assert self._pass is not None
        handle = SlotHandle(self._pass, layer_idx, key_states, value_states)
        return handle, handle

    # transformers sizes its mask by these; positions are given explicitly and the handle masks by itself
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        return self.max_length, 0


class SlotHandle:
    """One layer's new keys and values on their way into the cache."""

    def __init__(
        self, forward: DecodePass | PromptPass, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        self._forward, self._layer, self._key, self._value = forward, layer, key, value

    def attend(self, query: torch.Tensor, layout: Layout, scaling: float) -> torch.Tensor:
        """query [n, Hq, T, D] -> [n, Hq, T, D]; stores the new keys and values first."""
        return self._forward.attend(self._layer, query, self._key, self._value, scaling)


class DecodePass:
    """One token a slot: new keys and values go to each slot's own position, then each span attends."""

    def __init__(
        self, cache: SlotCache, positions: torch.Tensor, spans: Sequence[Span], gates: torch.Tensor | None
    ) -> None:
        self._cache, self._at = cache, positions.view(-1, 1, 1, 1)
        self._spans = [_SpanAttention(cache, self._at, span, gates) for span in spans]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        where = self._at.expand(*key.shape[:2], 1, 1)
        keys.scatter_(3, where.expand_as(key.transpose(2, 3)), key.transpose(2, 3))
        values.scatter_(2, where.expand_as(value), value)
        query = query * scaling
        return torch.cat([span.attend(layer, query, keys, values) for span in self._spans])


class _SpanAttention:
    """Slots of like length. Scores are computed once; the local softmax takes its few columns of them."""

    def __init__(self, cache: SlotCache, at: torch.Tensor, span: Span, gates: torch.Tensor | None) -> None:
        start, stop, columns = self._span = span
        at, dtype, device = at[start:stop], cache.keys[0].dtype, at.device
        hidden = torch.arange(columns, device=device) > at
        self._bias = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
        self._gates = None if gates is None else gates[start:stop, :, :, None, None]
        if gates is not None:
            window = cache.window
            sink = torch.arange(min(window.sink, columns), device=device).expand(*at.shape[:3], -1)
            recent = at - torch.arange(min(window.recent, columns), device=device)
            # sink keys count once: a recent one among them is looked up beyond the query, where none is seen
            places = torch.cat([sink, recent.masked_fill(recent < window.sink, columns)], dim=-1)
            self._window_hidden = ~window.sees(at, places)
            self._window_columns = places.clamp(max=columns - 1)

    def attend(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """query [n, Hq, 1, D], scaled, and one layer's whole keys and values -> [span's slots, Hq, 1, D]."""
        start, stop, columns = self._span
        query, keys, values = (
            query[start:stop],
            keys[start:stop, ..., :columns],
            values[start:stop, :, :columns],
        )
        slots, kv_heads, _, dim = values.shape
        folded = query.reshape(slots * kv_heads, -1, dim)
        shape = (slots, kv_heads, folded.shape[1], columns)
        bias = self._bias.expand(shape).flatten(0, 1)
        scores = torch.baddbmm(bias, folded, keys.flatten(0, 1)).view(shape)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
        if self._gates is not None:
            gate = self._gates[:, layer]
            near = self._window_columns.expand(*shape[:3], -1)
            local = scores.gather(-1, near).masked_fill_(self._window_hidden, -torch.inf)
            local = local.softmax(-1, dtype=torch.float32)
            weights = weights.mul_(gate).scatter_add_(-1, near, local * (1 - gate))
        output = torch.bmm(weights.to(values.dtype).flatten(0, 1), values.flatten(0, 1))
        return output.view(query.shape)


class PromptPass:
    """Whole prompts, right-padded: causality hides the padding, and decoding writes over it."""

    def __init__(self, cache: SlotCache, slots: torch.Tensor, gates: torch.Tensor | None) -> None:
        self._cache, self._slots, self._gates = cache, slots, gates

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        length = query.shape[2]
        self._cache.keys[layer][self._slots, :, :, :length] = key.transpose(2, 3)
        self._cache.values[layer][self._slots, :, :length] = value
        if self._gates is None:
            return causal_attention(query, key, value, scaling)
        return mixed_chunked(query, key, value, self._gates[:, layer], self._cache.window, scaling)
