"""What one forward pass knows of its rows: lengths, padding, packing. Made once, read by every layer.

transformers calls the registered mask function once and hands its result to each layer. Ours returns this
object instead of a tensor, so that nothing quadratic is built unless a layer asks for it.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask

from rlkv.window import Window

Sequences = list[tuple[int, int, int]]  # (row, first token, past its last token)


class Layout:
    """One forward pass: ``q_length`` new tokens a row, after ``kv_length - q_length`` older ones."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._local: dict[Window, torch.Tensor] = {}
        cache_position = arguments.get("cache_position")  # transformers < 5.6
        if cache_position is None:
            self.q_length: int = arguments["q_length"]
        else:
            self.q_length = cache_position.shape[0]
        self.batch: int = arguments["batch_size"]
        self.kv_length: int = arguments["kv_length"]

    @property
    def padding(self) -> torch.Tensor | None:
        """Bool [batch, kv_length], True for real tokens; None when every token is real."""
        return self._arguments.get("attention_mask")

    @property
    def is_plain_causal(self) -> bool:
        """Neither padding nor packing: position in the row is position in the sequence."""
        return self.padding is None and self._arguments["mask_function"] is causal_mask_function

    @cached_property
    def full(self) -> torch.Tensor:
        """Bool [batch, 1, q_length, kv_length]: what a full head sees."""
        mask = sdpa_mask(**{**self._arguments, "allow_is_causal_skip": False})
        assert mask is not None
        return mask

    def local(self, window: Window) -> torch.Tensor:
        """Bool [batch, 1, q_length, kv_length]: what a local head sees.

        A key's position in its own sequence is its rank among the keys the query sees, and the query's own
        key is the last of them: so padding on either side and packing need no special case.
        """
        if window not in self._local:
            rank = self.full.cumsum(-1) - 1
            self._local[window] = self.full & window.sees(rank[..., -1:], rank)
        return self._local[window]

    @cached_property
    def is_regular(self) -> bool:
        """Whether this forward, without older tokens, consists of unbroken causal sequences."""
        if self.q_length != self.kv_length or self._arguments.get("use_vmap"):
            return False
        if self.padding is None:
            return True
        if self.padding.shape[-1] != self.kv_length:
            return False
        begins = self.padding[:, 1:] & ~self.padding[:, :-1]
        return bool((begins.sum(-1) + self.padding[:, 0] <= 1).all())

    @cached_property
    def sequences(self) -> Sequences | None:
        """The sequences of a regular layout; None when every row is one that starts at its first token.

        Left padding and packing give a list (reading it waits for the device, once a forward); padding on the
        right needs none, since no real token sees it.
        """
        if self.is_plain_causal:
            return None
        padding = self.padding
        if padding is None:  # packed: ask the mask function whether each token sees the one before
            device = self._arguments.get("device")
            if device is None:
                device = self._arguments["cache_position"].device
            rows = torch.arange(self.batch, device=device)[:, None]
            later = torch.arange(1, self.kv_length, device=device)[None]
            joined = self._arguments["mask_function"](rows, 0, later, later - 1).expand(self.batch, -1)
            padding = joined.new_ones(self.batch, self.kv_length)
        else:
            joined = padding[:, :-1]
        edge = padding.new_zeros(self.batch, 1)
        starts = padding & ~torch.cat([edge, joined], 1)
        stops = padding & ~torch.cat([joined & padding[:, 1:], edge], 1)
        begins, ends = starts.nonzero().tolist(), stops.nonzero().tolist()
        if len(begins) == self.batch and all(column == 0 for _, column in begins):
            return None
        return [(row, start, stop + 1) for (row, start), (_, stop) in zip(begins, ends, strict=True)]


def make_layout(**arguments: Any) -> Layout:
    """The mask function registered with transformers under the name ``rlkv``."""
    return Layout(arguments)
