"""One forward pass over an evicting cache: of prompts, or of one token a slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from rlkv.attention import Layout
from rlkv.attention.chunked import causal_attention

if TYPE_CHECKING:
    from rlkv_eval.methods.eviction.cache import EvictingCache


@dataclass
class Handle:
    """What the cache gives the model in place of keys and values."""

    store_and_attend: Callable[[torch.Tensor, float], torch.Tensor]

    def attend(self, query: torch.Tensor, layout: Layout, scaling: float) -> torch.Tensor:
        """query [n, Hq, T, D] -> [n, Hq, T, D]; stores the new keys and values first."""
        return self.store_and_attend(query, scaling)


class PromptPass:
    """Prompts without their last tokens, right-padded: every head sees and keeps everything for now."""

    def __init__(self, cache: EvictingCache, slots: torch.Tensor, lengths: torch.Tensor) -> None:
        self._cache, self._slots, self._lengths = cache, slots, lengths

    def attend(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, query: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        cache, slots, count = self._cache, self._slots, query.shape[2]
        cache.keys[layer][slots, :, :, :count] = key.transpose(2, 3)
        cache.values[layer][slots, :, :count] = value
        cache.positions[layer][slots, :, :count] = torch.arange(count, dtype=torch.int32, device=key.device)
        score = cache.policy.see_prompt(query, key, self._lengths, scaling)
        cache.score[layer][slots, :, :count] = 0 if score is None else score
        return causal_attention(query, key, value, scaling)


class StepPass:
    """One token a slot, each span of slots by itself."""

    def __init__(self, cache: EvictingCache, spans: Sequence[tuple[int, int]], round_cells: int) -> None:
        ledger = cache.ledger
        rows = spans[-1][1]
        length, held, grows = ledger.length[:rows], ledger.held[:rows], ledger.grows[:rows]
        before = held - grows
        # a row that neither grows nor drops (nobody's) writes to its last cell
        numbers = np.stack((before, length, ledger.prompt[:rows], ledger.plan.held[length], held, grows))
        sent = cache.send(numbers)[:, :, None, None]
        drops = ledger.live[:rows] & ~grows
        self._spans = [
            _SpanPass(
                cache,
                slice(start, stop),
                min(-(-int(held[start:stop].max()) // round_cells) * round_cells, cache.cells),
                bool(drops[start:stop].any()),
                sent[:, start:stop],
            )
            for start, stop in spans
        ]

    def attend(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, query: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        query = query * scaling
        return torch.cat([span.attend(layer, key, value, query) for span in self._spans])


class _SpanPass:
    """Slots ``rows`` over their first ``cells`` cells; ``numbers`` int64 [6, n, 1, 1], see StepPass."""

    def __init__(
        self, cache: EvictingCache, rows: slice, cells: int, drops: bool, numbers: torch.Tensor
    ) -> None:
        self._cache, self._rows, self._cells, self._drops = cache, rows, cells, drops
        self._numbers, self._held, self._grows = numbers[:4], numbers[4], numbers[5].bool()
        self._position = (numbers[1] - 1).int()
        dtype = cache.keys[0].dtype
        empty = torch.arange(cells, device=numbers.device) >= self._held[:, None]
        self._bias = torch.zeros(empty.shape, dtype=dtype, device=numbers.device)
        self._bias.masked_fill_(empty, -torch.inf)

    def attend(self, layer: int, key: torch.Tensor, value: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """New key, value [all slots, H, 1, D]; scaled query [all slots, Hq, 1, D] -> [n, Hq, 1, D]."""
        cache, rows = self._cache, self._rows
        view = cache.view(layer, rows, self._cells, self._numbers)
        values = cache.values[layer][rows, :, : self._cells]
        key, value, query = key[rows], value[rows], query[rows]
        slots, heads, _, dim = value.shape

        cell = (self._held - 1).expand(-1, heads, -1)
        if self._drops:
            cell = torch.where(self._grows, cell, cache.policy.victim(view))
        column, row = cell[:, :, None].expand(-1, -1, dim, -1), cell[..., None].expand(-1, -1, -1, dim)
        view.keys.scatter_(3, column, key.transpose(2, 3))
        values.scatter_(2, row, value)
        view.positions.scatter_(2, cell, self._position.expand(-1, heads, -1))
        view.score.scatter_(2, cell, 0.0)
        view.held = self._held

        folded = query.reshape(slots * heads, -1, dim)
        shape = (slots, heads, folded.shape[1], self._cells)
        bias = self._bias.expand(shape).flatten(0, 1)
        scores = torch.baddbmm(bias, folded, view.keys.flatten(0, 1)).view(shape)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
        cache.policy.see_step(view, scores, weights)
        output = torch.bmm(weights.to(values.dtype).flatten(0, 1), values.flatten(0, 1))
        return output.view(query.shape)
