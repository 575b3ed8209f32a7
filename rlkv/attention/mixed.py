"""Soft gates of one forward pass, and the choice of the path that computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F

from rlkv.attention import fused
from rlkv.attention.chunked import causal_attention, mixed_chunked, over_sequences
from rlkv.attention.layout import Layout, Sequences
from rlkv.attention.reference import expand_kv, mixed_attention
from rlkv.errors import RLKVError
from rlkv.window import Window

PATHS = ("auto", "reference", "chunked", "kernel")


@dataclass
class Mixed:
    """Soft gates for one forward pass without a cache: gates [layers, kv_heads] or [batch, layers, kv_heads].

    ``path``: "reference" builds length x length scores and equals eager attention bit for bit when every gate
    is 1; "chunked" builds nothing quadratic, and needs causal sequences (padded or packed at will);
    "kernel" is the same by :mod:`rlkv.kernels` on a GPU (half precision, no padding on the left);
    "auto" is the fastest that applies. ``cu_seqlens``: where the sequences of a packed batch [1, T]
    start and, last, T; not needed when position_ids that restart at 0 are passed and attention_mask is not.
    """

    gates: torch.Tensor
    window: Window
    path: str = "auto"
    cu_seqlens: Sequence[int] | torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.path not in PATHS:
            raise RLKVError(f"attention path must be one of {', '.join(PATHS)}; got {self.path!r}")
        if self.gates.ndim not in (2, 3):
            raise RLKVError(
                f"gates must be [layers, kv_heads] or [batch, layers, kv_heads]; got {list(self.gates.shape)}"
            )

    @cached_property
    def all_full(self) -> bool:
        """Constant gates that are all 1: the local branch can be left out."""
        return not self.gates.requires_grad and bool((self.gates == 1).all())

    @cached_property
    def _packed(self) -> Sequences | None:
        if self.cu_seqlens is None:
            return None
        edges = [int(edge) for edge in self.cu_seqlens]
        return [(0, start, stop) for start, stop in zip(edges, edges[1:], strict=False)]

    @cached_property
    def _closed(self) -> list[tuple[int, ...]]:
        """For each layer the heads whose gates are all exactly 0: one look at the device a forward."""
        zero = (self.gates == 0).reshape(-1, *self.gates.shape[-2:]).all(0)
        return [tuple(layer.nonzero()[:, 0].tolist()) for layer in zero.cpu()]

    def closed(self, index: int) -> tuple[int, ...]:
        """KV heads of one layer whose gates are all exactly 0."""
        return self._closed[index]

    def layer(self, index: int) -> torch.Tensor:
        """Gates of one layer: [kv_heads] or [batch, kv_heads]."""
        return self.gates[..., index, :]

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: Layout,
        scaling: float,
    ) -> torch.Tensor:
        """Mixed attention of one layer; query [B, Hq, Tq, D], key and value [B, Hkv, Tk, D]."""
        self._check(module.config.num_hidden_layers, key, layout)
        gates, states = self.layer(module.layer_idx), (query, key, value)
        sequences = self._packed
        if self.path == "reference" or (sequences is None and not layout.is_regular):
            if self.path in ("chunked", "kernel"):
                raise RLKVError(
                    f"the {self.path} path needs unbroken causal sequences and no cache; use path='auto'"
                )
            if sequences is None:
                full, local = layout.full, layout.local(self.window)
                return mixed_attention(query, key, value, gates, full, local, scaling)
            kernel = partial(_reference, window=self.window, scaling=scaling)
            return over_sequences(kernel, states, gates, sequences)
        sequences = layout.sequences if sequences is None else sequences
        if self.all_full:
            return over_sequences(partial(causal_attention, scaling=scaling), states, None, sequences)
        wanted = self.path == "kernel" or (self.path == "auto" and query.is_cuda)
        lengths = fused.lengths_of(query, key, sequences) if wanted else None
        if lengths is not None:
            closed = self.closed(module.layer_idx)
            return fused.attend(states, gates, lengths, self.window, scaling, closed)
        if self.path == "kernel":
            raise RLKVError(
                "the mixed kernel needs 16-bit states on CUDA, a head dim with tiles, and rows without left "
                "padding; use path='auto'"
            )
        kernel = partial(mixed_chunked, window=self.window, scaling=scaling)
        return over_sequences(kernel, states, gates, sequences)

    def check_gates(self, batch: int, layers: int, heads: int) -> None:
        """Raise RLKVError unless the gates are of such a model: one table, or one a row of the batch."""
        if self.gates.shape[-2:] != (layers, heads) or (self.gates.ndim == 3 and len(self.gates) != batch):
            raise RLKVError(
                f"gates of shape {list(self.gates.shape)} don't fit: this forward has {layers} layers x "
                f"{heads} KV heads and a batch of {batch}"
            )

    def _check(self, layers: int, key: torch.Tensor, layout: Layout) -> None:
        batch, heads, length, _ = key.shape
        self.check_gates(batch, layers, heads)
        if self._packed is None:
            return
        starts = [start for _, start, _ in self._packed]
        lengths = [stop - start for _, start, stop in self._packed]
        whole = batch == 1 and sum(lengths) == length and starts[:1] == [0] and layout.padding is None
        if not whole or min(lengths) < 1:
            raise RLKVError(
                f"cu_seqlens must rise from 0 to the {length} tokens of one unpadded row [1, {length}], got "
                f"a batch of {batch} and {[*starts, starts[-1] + lengths[-1]] if starts else []}"
            )


def _reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gates: torch.Tensor,
    window: Window,
    scaling: float,
) -> torch.Tensor:
    """The reference on one whole sequence."""
    position = torch.arange(query.shape[2], device=query.device)
    full = (position <= position[:, None])[None, None]
    local = window.sees(position[:, None], position)[None, None]
    return mixed_attention(query, key, value, gates, full, local, scaling)


def full_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scaling: float
) -> torch.Tensor:
    """The base model's attention, with or without an ordinary cache; shapes as in :meth:`Mixed.attend`."""
    if layout.is_regular:
        kernel = partial(causal_attention, scaling=scaling)
        return over_sequences(kernel, (query, key, value), None, layout.sequences)
    groups = query.shape[1] // key.shape[1]
    visible = None if layout.is_plain_causal and layout.q_length == 1 else layout.full
    return F.scaled_dot_product_attention(
        query, expand_kv(key, groups), expand_kv(value, groups), attn_mask=visible, scale=scaling
    )
