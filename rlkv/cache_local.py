"""The local heads of one layer: a ring of sink + recent tokens, and a turn that is not cut to it yet."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rlkv.attention.masked import QUERIES_AT_ONCE, masked_attention
from rlkv.cache_rows import Forward
from rlkv.window import Window


class LocalHeads:
    """The ring [B, heads, window size, D] of one layer's local heads, and a turn that is not cut yet."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.turn_keys: torch.Tensor | None = None  # [B, heads, tokens of the turn, D]
        self.turn_values: torch.Tensor | None = None
        self._turn: Forward | None = None  # the last forward of that turn

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        forward: Forward,
        scaling: float,
        windowed: bool,
        cut: bool,
    ) -> torch.Tensor:
        """Attend and store: query [B, heads, groups, T, D], and so the result; key, value [B, heads, T, D].

        Of several new tokens each sees its own window if ``windowed``, else all of its turn; the turn is then
        cut to the window if ``cut``.
        """
        if forward.decodes and cut:
            return self._decode(query[:, :, :, 0], key, value, forward, scaling)[:, :, :, None]
        if windowed:
            return self._windowed(query, key, value, forward, scaling)
        output = self._whole_turn(query, key, value, forward, scaling)
        if cut:
            self.close_turn()
        return output

    def store_turn(self, key: torch.Tensor, value: torch.Tensor, forward: Forward, cut: bool) -> None:
        """Store a turn's tokens [B, heads, T, D] that were attended elsewhere."""
        self._extend_turn(key, value, forward)
        if cut:
            self.close_turn()

    def close_turn(self) -> None:
        """Cut the turn to the window."""
        if self._turn is not None and self.turn_keys is not None and self.turn_values is not None:
            start = self._turn.stop - self.turn_keys.shape[2]
            self._cut(self.turn_keys, self.turn_values, self._turn, start, self._turn.stop)
            self.turn_keys = self.turn_values = self._turn = None

    def _decode(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        forward: Forward,
        scaling: float,
    ) -> torch.Tensor:
        """Store and attend one token a request: query [B, heads, groups, D]; key, value [B, heads, 1, D]."""
        keys, values = self._ring(key)
        rows = torch.arange(len(key), device=key.device)
        keys[rows, :, forward.slot] = key[:, :, 0]
        values[rows, :, forward.slot] = value[:, :, 0]
        visible = forward.ring_visible
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=scaling)

    def _windowed(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        forward: Forward,
        scaling: float,
    ) -> torch.Tensor:
        """Store and attend new tokens, each of which sees its own window: query [B, heads, groups, T, D].

        Piece by piece: what older tokens a piece may see is then all in the ring.
        """
        parts = []
        for begin in range(forward.start, forward.stop, QUERIES_AT_ONCE):
            end = min(begin + QUERIES_AT_ONCE, forward.stop)
            part = slice(begin - forward.start, end - forward.start)
            keys, values = self._ring(key)
            new = forward.positions(begin, end)
            parts.append(
                masked_attention(
                    query[:, :, :, part],
                    torch.cat([keys, key[:, :, part]], dim=2),
                    torch.cat([values, value[:, :, part]], dim=2),
                    new,
                    torch.cat([forward.held(begin), new], dim=1),
                    scaling,
                    self.window,
                )
            )
            self._cut(key[:, :, part], value[:, :, part], forward, begin, end)
        return torch.cat(parts, dim=3)

    def _whole_turn(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        forward: Forward,
        scaling: float,
    ) -> torch.Tensor:
        """Attend new tokens, each of which sees the ring and its turn so far: query [B, heads, groups, T, D].

        The new tokens join the turn.
        """
        keys, values = self._ring(key)
        self._extend_turn(key, value, forward)
        assert self.turn_keys is not None and self.turn_values is not None
        turn_start = forward.stop - self.turn_keys.shape[2]
        keys, values = torch.cat([keys, self.turn_keys], 2), torch.cat([values, self.turn_values], 2)
        turn = forward.positions(turn_start, forward.stop)
        positions = torch.cat([forward.held(turn_start), turn], dim=1)
        parts = []
        for begin in range(forward.start, forward.stop, QUERIES_AT_ONCE):
            end = min(begin + QUERIES_AT_ONCE, forward.stop)
            seen = self.window.size + end - turn_start
            parts.append(
                masked_attention(
                    query[:, :, :, begin - forward.start : end - forward.start],
                    keys[:, :, :seen],
                    values[:, :, :seen],
                    turn[:, begin - turn_start : end - turn_start],
                    positions[:, :seen],
                    scaling,
                )
            )
        return torch.cat(parts, dim=3)

    def _extend_turn(self, key: torch.Tensor, value: torch.Tensor, forward: Forward) -> None:
        self._turn = forward
        if self.turn_keys is None or self.turn_values is None:
            self.turn_keys, self.turn_values = key, value
        else:
            self.turn_keys = torch.cat([self.turn_keys, key], dim=2)
            self.turn_values = torch.cat([self.turn_values, value], dim=2)

    def _cut(self, key: torch.Tensor, value: torch.Tensor, forward: Forward, start: int, stop: int) -> None:
        """Keep of columns [start, stop), key and value [B, heads, stop - start, D], what the window holds."""
        held = forward.held(stop)
        column = held + forward.tensors.first[:, None] - start
        fresh = ((held >= 0) & (column >= 0))[:, None, :, None]
        column = column.clamp(0, stop - start - 1)[:, None, :, None]
        column = column.expand(-1, key.shape[1], -1, key.shape[3])
        keys, values = self._ring(key)
        self.keys = torch.where(fresh, key.gather(2, column), keys)
        self.values = torch.where(fresh, value.gather(2, column), values)

    def _ring(self, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keys is None or self.values is None:
            batch, heads, _, dim = key.shape
            self.keys = key.new_zeros(batch, heads, self.window.size, dim)
            self.values = torch.zeros_like(self.keys)
        return self.keys, self.values
