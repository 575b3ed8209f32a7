"""Keys and values in pages, and what a forward pass does with them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache

from rlkv.attention import Layout
from rlkv.attention.chunked import causal_attention, local_attention
from rlkv.family import use_kernels
from rlkv.paged.plain import PlainDecoder
from rlkv.paged.plain import store as plain_store
from rlkv.paged.pool import TRASH
from rlkv.slots import Prefill
from rlkv.support import ModelShape
from rlkv.window import Window

COPIED_AT_ONCE = 4096  # pages


class PagedCache(Cache):
    """``keys`` and ``values`` [pages, page_size, head_dim], shared by all layers and heads.

    Their memory can be given back between rollouts: ``release`` and ``hold``. ``decode`` or ``prompt`` says
    what the next forward is; a forward of transformers then passes through ``update``, one of our own calls
    ``attend_one``. Decoding is plain PyTorch's where the kernels don't run, have no tiles for the head dim,
    or find no room for one of their blocks in ``max_length`` tokens.
    """

    def __init__(
        self,
        shape: ModelShape,
        *,
        pages: int,
        page_size: int,
        slots: int,
        max_length: int,
        window: Window,
        prefill: Prefill,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(layers=[])
        self.window, self.prefill, self.page_size = window, prefill, page_size
        self.keys: Any = None
        self.values: Any = None
        self._place: dict[str, Any] = {"dtype": dtype, "device": device}
        self._sizes = (pages, page_size, shape.head_dim)
        self.hold()
        self._scaling = shape.head_dim**-0.5
        self._every_head = torch.ones(shape.kv_heads, dtype=torch.bool, device=device)
        self.decoder: Any = PlainDecoder()
        self._store: Any = plain_store
        if use_kernels(device, shape.head_dim):
            from rlkv.kernels.decode import PagedDecoder
            from rlkv.kernels.decode import store as kernel_store

            decoder = PagedDecoder(
                rows=slots * shape.kv_heads,
                query_heads=shape.query_heads,
                kv_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                device=device,
                programs=None if device.type == "cuda" else 3,
            )
            if -(-max_length // page_size) * page_size >= decoder.tuning.block:
                self.decoder = decoder
                # positions and table are made long before the kernel that comes before it
                self._store = partial(kernel_store, early=True)
        self._step: _Step | None = None
        self._prompt: _Prompt | None = None

    @property
    def on_kernels(self) -> bool:
        return not isinstance(self.decoder, PlainDecoder)

    def hold(self) -> None:
        """Take memory for the pages, unless they have theirs."""
        if self.keys is None:
            _return_unused(self._place["device"])
            self.keys, self.values = (torch.zeros(self._sizes, **self._place) for _ in range(2))

    def release(self) -> None:
        """Give the pages' memory back; whatever they held is lost."""
        self.keys = self.values = self._step = self._prompt = None
        _return_unused(self._place["device"])

    def decode(
        self,
        table: torch.Tensor,
        positions: torch.Tensor,
        full: torch.Tensor | None,
        gates: torch.Tensor | None,
    ) -> None:
        """The next forward is one token a row at ``positions`` (int64 [n], negative for an empty row).

        ``table`` int32 [layers, n, kv_heads, most]; ``full`` bool [n, layers, kv_heads] says which heads hold
        every token (None: all); ``gates`` float32 [n, layers, kv_heads] for soft gates, which need them all.
        """
        self._prompt = None
        self._step = _Step(self, table, positions, full, gates)

    def prompt(
        self,
        table: torch.Tensor,
        lengths: torch.Tensor,
        full: torch.Tensor | None,
        gates: torch.Tensor | None,
        ungated: torch.Tensor | None,
    ) -> None:
        """The next forward is right-padded rows of ``lengths`` (int64 [n]) tokens from position 0.

        ``gates`` float32 [n, layers, kv_heads], or None for full attention; the first ``ungated`` (int64 [n])
        tokens of each row attend fully in any case. The rest is as in ``decode``.
        """
        self._step, self._prompt = None, _Prompt(self, table, lengths, full, gates, ungated)

    def attend_one(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float = 0.0
    ) -> torch.Tensor:
        """One token a row: query [n, Hq, D], key and value [n, Hkv, D] -> [n, Hq, D]."""
        assert self._step is not None
        return self._step.attend(layer, query, key, value, scaling or self._scaling)

    def copy_pages(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Contents of pages ``source`` (int64) to pages ``target``."""
        for old, new in zip(source.split(COPIED_AT_ONCE), target.split(COPIED_AT_ONCE), strict=True):
            for states in (self.keys, self.values):
                states[new] = states[old]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """key_states, value_states [n, kv_heads, T, D] -> the handle that stores them and attends, twice."""
        handle = _Handle(self, layer_idx, key_states, value_states)
        return handle, handle

    # transformers sizes its mask by these; positions are given explicitly and the handle masks by itself
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        return self.page_size, 0


class _Handle:
    """One layer's new keys and values on their way into the pages."""

    def __init__(self, cache: PagedCache, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._cache, self._layer, self._key, self._value = cache, layer, key, value

    def attend(self, query: torch.Tensor, layout: Layout, scaling: float) -> torch.Tensor:
        """query [n, Hq, T, D] -> [n, Hq, T, D]."""
        if self._cache._prompt is not None:
            return self._cache._prompt.attend(self._layer, query, self._key, self._value, scaling)
        key, value = self._key[:, :, 0], self._value[:, :, 0]
        return self._cache.attend_one(self._layer, query[:, :, 0], key, value, scaling)[:, :, None]


class _Step:
    """One token a row: it is stored in its row's page, then the row is attended over."""

    def __init__(
        self,
        cache: PagedCache,
        table: torch.Tensor,
        positions: torch.Tensor,
        full: torch.Tensor | None,
        gates: torch.Tensor | None,
    ) -> None:
        self._cache, self._table, self._positions, self._full = cache, table, positions, full
        layers, _, heads, _ = table.shape
        held = (positions + 1)[None, :, None].expand(layers, -1, heads)
        if full is not None:
            held = torch.where(full.transpose(0, 1), held, held.clamp(max=cache.window.size))
        counts = held.int().contiguous()
        self._plan = cache.decoder.plan(counts, gates, None if gates is None else cache.window)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        cache, table = self._cache, self._table[layer]
        full = cache._every_head if self._full is None else self._full[:, layer]
        cache._store(key, value, cache.keys, cache.values, table, self._positions, full, cache.window)
        return cache.decoder.attend(query, cache.keys, cache.values, table, self._plan, layer, scaling)


class _Prompt:
    """Whole rows, right-padded: causality hides the padding, whose keys and values go nowhere."""

    def __init__(
        self,
        cache: PagedCache,
        table: torch.Tensor,
        lengths: torch.Tensor,
        full: torch.Tensor | None,
        gates: torch.Tensor | None,
        ungated: torch.Tensor | None,
    ) -> None:
        self._cache, self._table, self._lengths = cache, table, lengths
        self._full, self._gates, self._ungated = full, gates, ungated

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        self._store(layer, key, value)
        output = causal_attention(query, key, value, scaling)
        if self._gates is None:
            return output
        local = local_attention(query, key, value, self._cache.window, scaling)
        gate = self._gates[:, layer, :, None].repeat_interleave(query.shape[1] // key.shape[1], 1)
        if self._ungated is not None:
            at = torch.arange(query.shape[2], device=query.device)
            gate = torch.where(at < self._ungated[:, None, None], 1.0, gate)
        wide = torch.promote_types(query.dtype, torch.float32)
        return torch.lerp(local.to(wide), output.to(wide), gate[..., None].to(wide)).to(query.dtype)

    def _store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        cache, table = self._cache, self._table[layer]
        rows, heads, length, dim = key.shape
        at = torch.arange(length, device=key.device)
        real = at < self._lengths[:, None]
        place, kept = at.expand(rows, heads, -1), real[:, None]
        if self._full is not None:
            window, full = cache.window, self._full[:, layer, :, None]
            near = real & window.sees(self._lengths[:, None] - 1, at)
            place = torch.where(full, place, window.slot(at))
            kept = torch.where(full, kept, near[:, None])
        column = (place // cache.page_size).clamp(max=table.shape[2] - 1)
        page = table.gather(2, column).long()
        cell = torch.where(kept, page * cache.page_size + place % cache.page_size, TRASH).flatten()
        for states, new in ((cache.keys, key), (cache.values, value)):
            states.view(-1, dim)[cell] = new.reshape(-1, dim)


def _return_unused(device: torch.device) -> None:
    """To the device, in whole: PyTorch would hand out parts of a large block, which then no longer fits."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
