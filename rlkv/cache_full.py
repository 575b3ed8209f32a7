"""The full heads of one layer: a flat buffer that grows by blocks.

Query heads are folded into the query axis of their KV head (its ``groups``), so keys and values are never
repeated. Every place that no token was written to holds zeros: hidden places meet a weight of 0, not a NaN.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from rlkv.attention.chunked import causal_attention, over_sequences
from rlkv.attention.layout import Layout
from rlkv.attention.masked import QUERIES_AT_ONCE, masked_attention
from rlkv.cache_rows import Forward, Rows


class FullHeads:
    """Keys and values [heads, total, D] of one layer's full heads, laid out by a :class:`Rows`."""

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self._rows: Rows | None = None

    def store(self, key: torch.Tensor, value: torch.Tensor, forward: Forward) -> None:
        """Append key, value [B, heads, T, D]; the buffer is reallocated when a new block begins."""
        if self._rows is not forward.rows:
            self.keys = self._moved(self.keys, key, forward)
            self.values = self._moved(self.values, value, forward)
            self._rows = forward.rows
        assert self.keys is not None and self.values is not None
        for buffer, states in ((self.keys, key), (self.values, value)):
            if forward.decodes:
                buffer.index_copy_(1, forward.place, states[:, :, 0].transpose(0, 1))
                continue
            for row, first in enumerate(forward.rows.first):
                begin = max(first, forward.start)
                place = forward.rows.place(row, begin, forward.stop)
                buffer[:, place] = states[row, :, begin - forward.start :]

    def _moved(self, buffer: torch.Tensor | None, states: torch.Tensor, forward: Forward) -> torch.Tensor:
        _, heads, _, dim = states.shape
        old, new = self._rows, forward.rows
        moved = states.new_zeros(heads, new.total, dim)
        if buffer is None or old is None:
            return moved
        if old.dense and new.dense and old.base == new.base:
            batch, used = len(new.first), forward.start - new.base[0]
            moved.view(heads, batch, -1, dim)[:, :, :used] = buffer.view(heads, batch, -1, dim)[:, :, :used]
            return moved
        for row, first in enumerate(new.first):
            if first < forward.start:
                source = old.place(row, first, forward.start)
                moved[:, new.place(row, first, forward.start)] = buffer[:, source]
        return moved

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: Layout,
        forward: Forward,
        scaling: float,
    ) -> torch.Tensor:
        """Store key, value [B, heads, T, D] and attend: query [B, heads, groups, T, D], and so the result."""
        self.store(key, value, forward)
        if forward.decodes:
            return self._decode(query[:, :, :, 0], forward, scaling)[:, :, :, None]
        if forward.start == 0:
            kernel, states = partial(causal_attention, scaling=scaling), (query.flatten(1, 2), key, value)
            return over_sequences(kernel, states, None, layout.sequences).view(query.shape)
        return self._later(query, forward, scaling)

    def _decode(self, query: torch.Tensor, forward: Forward, scaling: float) -> torch.Tensor:
        """One stored token a request: query [B, heads, groups, D], and so the result."""
        assert self.keys is not None and self.values is not None
        query = query.transpose(0, 1)
        if forward.rows.dense:
            shape = (len(self.keys), len(forward.rows.first), -1, self.keys.shape[-1])
            used = slice(min(forward.rows.first) - forward.rows.base[0], forward.stop - forward.rows.base[0])
            key, value = self.keys.view(shape)[:, :, used], self.values.view(shape)[:, :, used]
            visible = forward.dense_visible
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling)
        else:
            output = self._decode_blocks(query, forward, scaling)
        return output.transpose(0, 1)

    def _decode_blocks(self, query: torch.Tensor, forward: Forward, scaling: float) -> torch.Tensor:
        """Rows of different capacity: scores block by block, softmax over the blocks of each request.

        query [heads, B, groups, D]. Keys and values are read once and never copied, however ragged the batch.
        """
        assert self.keys is not None and self.values is not None
        heads, batch, groups, dim = query.shape
        owner, block = forward.tensors.owner, forward.rows.block
        flat, shape = (-1, block, dim), (heads, len(owner), groups, -1)
        spread = (query * scaling).index_select(1, owner).flatten(0, 1)
        scores = torch.bmm(spread, self.keys.view(flat).transpose(1, 2)).view(shape).float()
        scores = scores.masked_fill(forward.blocks_hidden, -torch.inf)
        index = owner[:, None].expand(heads, -1, groups)
        peak = scores.new_full((heads, batch, groups), -torch.inf)
        peak = peak.scatter_reduce(1, index, scores.amax(-1), "amax")
        weights = torch.exp(scores - peak.index_select(1, owner)[..., None])
        total = torch.zeros_like(peak).index_add_(1, owner, weights.sum(-1))
        parts = torch.bmm(weights.to(query.dtype).flatten(0, 1), self.values.view(flat)).view(shape).float()
        output = parts.new_zeros(heads, batch, groups, dim).index_add_(1, owner, parts)
        return (output / total[..., None]).to(query.dtype)

    def _later(self, query: torch.Tensor, forward: Forward, scaling: float) -> torch.Tensor:
        """Several stored tokens after older ones: query [B, heads, groups, T, D], and so the result."""
        assert self.keys is not None and self.values is not None
        output = torch.zeros_like(query)
        positions = forward.positions(0, forward.stop)
        for row, first in enumerate(forward.rows.first):
            place = forward.rows.place(row, first, forward.stop)
            key, value = self.keys[None, :, place], self.values[None, :, place]
            for begin in range(max(first, forward.start), forward.stop, QUERIES_AT_ONCE):
                end = min(begin + QUERIES_AT_ONCE, forward.stop)
                part = slice(begin - forward.start, end - forward.start)
                output[row : row + 1, :, :, part] = masked_attention(
                    query[row : row + 1, :, :, part],
                    key[:, :, : end - first],
                    value[:, :, : end - first],
                    positions[row : row + 1, begin:end],
                    positions[row : row + 1, first:end],
                    scaling,
                )
        return output
