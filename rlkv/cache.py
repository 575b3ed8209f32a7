"""A KV cache for transformers that really shrinks: full heads grow, local heads keep sink + recent tokens.

    enable(model)
    cache = HeadwiseCache(model.config, mask, window=Window(16, 64))
    model.generate(**inputs, past_key_values=cache)

See docs/cache.md for what prompts in chunks, later turns and padding mean.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NoReturn

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from rlkv.attention.layout import Layout
from rlkv.cache_layer import HeadwiseLayer
from rlkv.cache_rows import Forward, Rows
from rlkv.errors import RLKVError
from rlkv.mask import HeadMask
from rlkv.window import Window

PREFILLS = ("full", "local")


class HeadwiseCache(Cache):
    """Keys and values of one batch: every token for the mask's full heads, the window for its local heads.

    ``window`` defaults to the mask's, and another is warned of. ``prefill="full"``: all heads see the whole
    prompt, and the local heads are cut to the window after it; ``"local"``: they are windowed in the prompt
    too. ``block``: full heads grow every so many tokens. Raises RLKVError for a mask of another shape, or a
    model that can't be split.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        mask: HeadMask,
        window: Window | None = None,
        prefill: Literal["full", "local"] = "full",
        block: int = 64,
    ) -> None:
        self.shape = mask.check(config)
        if prefill not in PREFILLS:
            raise RLKVError(f"prefill must be one of {', '.join(PREFILLS)}; got {prefill!r}")
        if block < 1:
            raise RLKVError(f"block is a number of tokens, 1 or more; got {block}")
        window = window or mask.window
        if window is None:
            if not mask.full.all():
                raise RLKVError("the mask records no window; pass window=Window(16, 64), say")
            window = Window(0, 1)
        for line in mask.remarks(window):
            warnings.warn(line, stacklevel=2)
        self.mask, self.window, self.prefill, self.block = mask, window, prefill, block
        self.chunking = False
        self._layers = [HeadwiseLayer(self, full) for full in mask.full]
        super().__init__(layers=list(self._layers))
        self._forget()

    def _forget(self) -> None:
        self._rows: Rows | None = None
        self._forwards: dict[torch.device, Forward] = {}  # of the forward in progress
        self._at: tuple[int, int] | None = None  # its start and count
        self._after_prompt = False  # the last forward had several tokens

    def nbytes(self) -> int:
        """Bytes of storage that the cache's tensors really hold now."""
        storages = [tensor.untyped_storage() for layer in self._layers for tensor in layer.tensors()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    @contextmanager
    def chunked_prefill(self) -> Iterator[None]:
        """Forwards inside are chunks of one prompt (or turn): the same result as feeding it in one piece.

        With prefill "full" the local heads stay whole, and hold their memory, until the block ends.
        """
        self.chunking = self.prefill == "full"
        try:
            yield
        finally:
            self.chunking = False
            for layer in self._layers:
                layer.local_heads.close_turn()
            self.new_turn()

    def new_turn(self) -> None:
        """What comes next is a turn of its own, even if it follows a prompt directly."""
        self._after_prompt = False

    def reset(self) -> None:
        """Forget everything, for another batch."""
        self._forget()
        for layer in self._layers:
            layer.reset()

    def begin(self, layout: Layout, start: int, count: int, device: torch.device) -> Forward:
        """The forward in progress, as every layer sees it; the first layer's call checks it."""
        if self._at != (start, count):
            self._open(layout, start, count)
            self._at, self._forwards = (start, count), {}
        if device not in self._forwards:
            assert self._rows is not None
            self._forwards[device] = Forward(self._rows, start, count, self.window, device)
        return self._forwards[device]

    def _open(self, layout: Layout, start: int, count: int) -> None:
        """Check a forward against what is stored, and make room."""
        stop, rows = start + count, self._rows
        if rows is not None and len(rows.first) != layout.batch:
            raise RLKVError(
                f"this cache holds a batch of {len(rows.first)} and got one of {layout.batch}; "
                "make a new HeadwiseCache, or cache.reset(), for another batch"
            )
        ambiguous = self.prefill == "full" and not self.chunking and not self.mask.full.all()
        if count > 1 and self._after_prompt and ambiguous:
            raise RLKVError(
                "several tokens right after a prompt: wrap the chunks of one prompt in `with "
                "cache.chunked_prefill():`, or call cache.new_turn() first, or use prefill='local'"
            )
        self._after_prompt = count > 1
        if rows is None or count > 1 or max(rows.first) >= start:  # the last: a row was all padding so far
            first = self._left_padding(layout, start, stop)
        else:
            first = rows.first
        longest, context = stop - min(first), self.shape.context_length
        if count > 1 and context and longest > context:
            raise RLKVError(f"a prompt of {longest} tokens is longer than the model's context of {context}")
        if rows is None or stop > rows.end or first != rows.first:
            self._rows = Rows(first, stop, self.block)

    def _left_padding(self, layout: Layout, start: int, stop: int) -> list[int]:
        """Padding columns of each row; a row that is padding so far has ``stop`` of them."""
        known = self._rows.first if self._rows else None
        if layout.padding is None:
            first, unbroken = [0] * layout.batch, True
        else:
            if layout.padding.shape[-1] != stop:
                raise RLKVError(
                    f"attention_mask has {layout.padding.shape[-1]} columns; with a cache it covers the "
                    f"whole sequence so far, {stop} columns"
                )
            padding = (layout.padding.cumsum(-1) == 0).sum(-1)
            first, real = torch.stack([padding, layout.padding.sum(-1)]).tolist()
            unbroken = all(a + b == stop for a, b in zip(first, real, strict=True))
        same = known is None or all(a == b or b >= a >= start for a, b in zip(known, first, strict=True))
        if not unbroken or not same:
            raise RLKVError(
                "HeadwiseCache takes padding on the left only, and the same in every forward: set "
                "tokenizer.padding_side = 'left', always pass the whole attention_mask, and give every row "
                "of a later turn the same number of tokens"
            )
        return first

    def reorder_cache(self, beam_idx: torch.Tensor) -> NoReturn:
        _refuse("beam search (num_beams > 1)")

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("assisted decoding (assistant_model, prompt_lookup_num_tokens), which takes tokens back,")

    def activate_past_recording(self) -> NoReturn:
        self.crop()

    def batch_select_indices(self, indices: torch.Tensor) -> NoReturn:
        _refuse("contrastive search, which selects rows,")

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        _refuse("contrastive search, which repeats rows,")


def _refuse(what: str) -> NoReturn:
    raise RLKVError(
        f"{what} can't be used with a HeadwiseCache: local heads have dropped their older tokens; "
        "use greedy decoding or sampling"
    )
