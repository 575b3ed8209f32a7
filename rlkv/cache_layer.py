"""One layer of a HeadwiseCache, and the handle by which its attention is reached through transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers.cache_utils import CacheLayerMixin

from rlkv.attention.chunked import causal_attention, over_sequences
from rlkv.attention.layout import Layout
from rlkv.cache_full import FullHeads
from rlkv.cache_local import LocalHeads
from rlkv.errors import RLKVError

if TYPE_CHECKING:
    from rlkv.cache import HeadwiseCache


class HeadwiseLayer(CacheLayerMixin):
    """``update`` returns a handle that stores and attends, since keys and values are kept head by head."""

    is_sliding = False

    def __init__(self, cache: HeadwiseCache, full: torch.Tensor) -> None:
        super().__init__()
        self._cache = cache
        self._full, self._local = full.nonzero()[:, 0], (~full).nonzero()[:, 0]
        self.reset()

    def reset(self) -> None:
        self.length = 0  # columns, padding included
        self.full_heads, self.local_heads = FullHeads(), LocalHeads(self._cache.window)
        self.is_initialized = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._full, self._local = self._full.to(key_states.device), self._local.to(key_states.device)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """key_states, value_states [B, Hkv, T, D] -> the handle that stores them and attends, twice."""
        handle = LayerHandle(partial(self.attend, key_states, value_states))
        return handle, handle

    def tensors(self) -> list[torch.Tensor]:
        """Whatever holds keys or values."""
        full, local = self.full_heads, self.local_heads
        held = (full.keys, full.values, local.keys, local.values, local.turn_keys, local.turn_values)
        return [tensor for tensor in held if tensor is not None]

    def attend(
        self, key: torch.Tensor, value: torch.Tensor, query: torch.Tensor, layout: Layout, scaling: float
    ) -> torch.Tensor:
        """Store key, value [B, Hkv, T, D] and attend: query [B, Hq, T, D], and so the result."""
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        cache, (batch, heads, count, dim) = self._cache, key.shape
        forward = cache.begin(layout, self.length, count, key.device)
        self.length = forward.stop
        cut = not cache.chunking
        if forward.start == 0 and count > 1 and cache.prefill == "full":  # all heads see the same: one call
            kernel = partial(causal_attention, scaling=scaling)
            output = over_sequences(kernel, (query, key, value), None, layout.sequences)
            if len(self._full):
                self.full_heads.store(self._pick(key, self._full), self._pick(value, self._full), forward)
            if len(self._local):
                states = self._pick(key, self._local), self._pick(value, self._local)
                self.local_heads.store_turn(*states, forward, cut)
            return output
        grouped = query.reshape(batch, heads, -1, count, dim)
        output = torch.empty_like(grouped)
        if len(self._full):
            q, k, v = (self._pick(part, self._full) for part in (grouped, key, value))
            output[:, self._full] = self.full_heads.attend(q, k, v, layout, forward, scaling)
        if len(self._local):
            q, k, v = (self._pick(part, self._local) for part in (grouped, key, value))
            windowed = cache.prefill == "local"
            output[:, self._local] = self.local_heads.attend(q, k, v, forward, scaling, windowed, cut)
        return output.view(query.shape)

    def _pick(self, states: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Some KV heads of states [B, Hkv, ...]; no copy where that is all of them."""
        return states if len(kept) == states.shape[1] else states.index_select(1, kept)

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """The logical length, not the stored one; transformers < 5.6 passes positions, later ones a count."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.length + new, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier transformers


class LayerHandle:
    """Travels from the cache to the attention function in place of key and value."""

    def __init__(self, attend: Callable[[torch.Tensor, Layout, float], torch.Tensor]) -> None:
        self.attend = attend

    # Another attention takes it for a tensor, and asks for a tensor's attributes or hands it to torch.

    def __getattr__(self, name: str) -> NoReturn:
        _wrong_attention()

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        _wrong_attention()


def _wrong_attention() -> NoReturn:
    raise RLKVError(
        "a HeadwiseCache needs RLKV's attention: call model.set_attn_implementation('rlkv') first"
    )
