"""Several new tokens of local heads: whole prompts, chunks of prompts, and what a retracted request repeats.

Query i of a request sees key j iff j <= i and (i < exempt or the window sees it): the first ``exempt`` tokens
attend fully. With prefill "full" that is the prompt, whatever has been generated since, so a request that was
retracted and is processed again gets the states that it had; with prefill "local" it is 0.

Everything that does not depend on the layer is computed once a forward (:class:`Extend`). Nothing quadratic
is built: windowed queries go in blocks, each with the few keys that it sees.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from rlkv.attention.reference import expand_kv
from rlkv.serving.slots import Slots, Staging

BLOCK = 128  # windowed queries at once


@dataclass(frozen=True)
class Chunk:
    """New tokens [start, stop) of a request in request slot ``slot``, of which ``exempt`` attend fully."""

    request: Hashable
    slot: int
    start: int
    stop: int
    exempt: int = 0

    @property
    def unfinished(self) -> bool:
        """More tokens that attend fully are to come, so these must be kept whole."""
        return self.stop < self.exempt

    @property
    def resumed(self) -> bool:
        """Earlier tokens of this prompt are in the staging area."""
        return 0 < self.start < self.exempt


@dataclass(frozen=True)
class Whole:
    """Queries of one chunk that attend fully: rows of the new tokens, and the pool rows of older tokens."""

    first: int
    count: int
    older: torch.Tensor  # int64 [start]
    query_edges: torch.Tensor  # int32 [2]: 0 and count, as kernels for packed sequences want it
    key_edges: torch.Tensor  # int32 [2]: 0 and start + count


@dataclass(frozen=True)
class Windowed:
    """Blocks of queries and the keys that each block may see; rows count the new tokens, then ``older``."""

    query: torch.Tensor  # int64 [blocks, BLOCK], padded with the block's first query
    key: torch.Tensor  # int64 [blocks, keys], padded with the block's first query
    visible: torch.Tensor  # bool [blocks, 1, BLOCK, keys]
    older: torch.Tensor  # int64 [n], pool rows
    out: torch.Tensor  # int64 [m], the new tokens that the blocks hold
    place: torch.Tensor  # int64 [m], where in [blocks * BLOCK] they are


@dataclass(frozen=True)
class Packed:
    """All chunks are whole prompts: one launch of a kernel for packed sequences does."""

    edges: torch.Tensor  # int32 [chunks + 1], where they begin and, last, end
    longest: int


# Causal attention of packed sequences, aligned at their ends: (query [T, heads * groups, D], key, value
# [S, heads, D], query edges, key edges, longest query, longest key, scaling) -> [T, heads * groups, D]
Causal = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int, float], torch.Tensor
]


class Extend:
    """The layout of one forward over ``chunks``, whose new tokens lie one chunk after the other.

    Raises RLKVError when a chunk needs staging that it does not own, or that is too small.
    """

    def __init__(
        self, slots: Slots, staging: Staging, chunks: Sequence[Chunk], device: torch.device | str
    ) -> None:
        self.slots, self.chunks, self.device = slots, list(chunks), device
        self.whole: list[Whole] = []
        blocks: list[_Block] = []
        new_rows, pool_rows = [], []
        first = 0
        for chunk in self.chunks:
            if chunk.resumed:  # before another prompt takes the area over: all is read before it is written
                staging.resume(chunk.request, chunk.start)
        for chunk in self.chunks:
            count = min(chunk.stop, chunk.exempt) - chunk.start
            if count > 0:
                self.whole.append(_whole(slots, chunk, first, count, device))
            blocks += _blocks(slots, chunk, first)
            position = _kept(slots, chunk)
            new_rows.append(first + position - chunk.start)
            pool_rows.append(slots.ring(torch.tensor(chunk.slot), position))
            if chunk.unfinished:
                staging.fill(chunk.request, chunk.stop)
                position = torch.arange(chunk.start, chunk.stop)
                new_rows.append(first + position - chunk.start)
                pool_rows.append(slots.staged(position))
            else:
                staging.release(chunk.request)
            first += chunk.stop - chunk.start
        self.tokens = first
        self.windowed = _stack(slots, blocks, first, device) if blocks else None
        self.packed = None
        if self.chunks and not blocks and not any(chunk.start for chunk in self.chunks):
            lengths = [chunk.stop for chunk in self.chunks]
            self.packed = Packed(_edges(lengths, device), max(lengths))
        self._from, self._to = (torch.cat(rows).to(device) for rows in (new_rows, pool_rows))

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        output: torch.Tensor,
        causal: Causal | None = None,
    ) -> None:
        """Attend, then store: query and output [T, heads * groups, D]; key, value [T, heads, D].

        keys, values: the layer's pool [rows, heads, D]. It is read before anything is written to it, so a
        chunk longer than the window still finds what came before. ``causal``: an engine's kernel for plain
        causal attention (default: PyTorch's).
        """
        causal = causal or causal_attention
        if self.packed is not None:
            edges, longest = self.packed.edges, self.packed.longest
            output.copy_(causal(query, key, value, edges, edges, longest, longest, scaling))
        else:
            for part in self.whole:
                _attend_whole(part, query, key, value, keys, values, scaling, output, causal)
        if self.windowed is not None:
            _attend_windowed(self.windowed, query, key, value, keys, values, scaling, output)
        self.store(key, value, keys, values)

    def store(self, key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """What of the new tokens the window holds goes into the rings, unfinished prompts to staging."""
        keys[self._to] = key[self._from].to(keys.dtype)
        values[self._to] = value[self._from].to(values.dtype)


def _kept(slots: Slots, chunk: Chunk) -> torch.Tensor:
    """Positions of a chunk that the ring holds after it."""
    position = torch.arange(chunk.start, chunk.stop)
    return position[slots.window.sees(torch.tensor(chunk.stop - 1), position)]


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_edges: torch.Tensor,
    key_edges: torch.Tensor,
    longest_query: int,
    longest_key: int,
    scaling: float,
) -> torch.Tensor:
    """:data:`Causal` in plain PyTorch, one sequence after the other."""
    output, groups = torch.empty_like(query), query.shape[1] // key.shape[1]
    bounds = [list(zip(e, e[1:], strict=False)) for e in (query_edges.tolist(), key_edges.tolist())]
    for (start, stop), (key_start, key_stop) in zip(*bounds, strict=True):
        k, v = (expand_kv(x[key_start:key_stop].transpose(0, 1)[None], groups) for x in (key, value))
        mask = causal_lower_right(stop - start, key_stop - key_start)
        attended = F.scaled_dot_product_attention(
            query[start:stop].transpose(0, 1)[None], k, v, attn_mask=mask, scale=scaling
        )
        output[start:stop] = attended[0].transpose(0, 1)
    return output


def _edges(lengths: Sequence[int], device: torch.device | str) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def _whole(slots: Slots, chunk: Chunk, first: int, count: int, device: torch.device | str) -> Whole:
    older = slots.staged(torch.arange(chunk.start)).to(device)
    return Whole(first, count, older, _edges([count], device), _edges([chunk.start + count], device))


def _attend_whole(
    part: Whole,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    output: torch.Tensor,
    causal: Causal,
) -> None:
    """Causal attention of one request's queries over all of its tokens so far."""
    new, older = slice(part.first, part.first + part.count), part.older
    k, v = key[new], value[new]
    if len(older):
        k, v = torch.cat([keys[older].to(k.dtype), k]), torch.cat([values[older].to(v.dtype), v])
    output[new] = causal(query[new], k, v, part.query_edges, part.key_edges, part.count, len(k), scaling)


def _attend_windowed(
    part: Windowed,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    output: torch.Tensor,
) -> None:
    """Blocks of windowed queries, all at once; the query heads of a KV head are rows beside each other."""
    heads, dim = key.shape[1:]
    blocks, size = part.query.shape
    groups = query.shape[1] // heads
    k, v = (
        torch.cat([new, pool[part.older].to(new.dtype)])[part.key].transpose(1, 2)
        for new, pool in ((key, keys), (value, values))
    )
    grouped = query[part.query].view(blocks, size, heads, groups, dim).permute(0, 2, 3, 1, 4)
    attended = F.scaled_dot_product_attention(
        grouped.reshape(blocks, heads, groups * size, dim),
        k,
        v,
        attn_mask=part.visible.repeat(1, 1, groups, 1),
        scale=scaling,
    )
    attended = attended.view(blocks, heads, groups, size, dim).permute(0, 3, 1, 2, 4)
    output[part.out] = attended.reshape(blocks * size, -1, dim)[part.place]


@dataclass(frozen=True)
class _Block:
    """Windowed queries [start, stop) of a chunk whose first new token is row ``first``."""

    chunk: Chunk
    first: int
    start: int
    stop: int

    def keys(self, sink: int, recent: int) -> torch.Tensor:
        """Positions that some query of the block sees."""
        low = max(0, self.start - recent + 1)
        return torch.cat([torch.arange(min(sink, low)), torch.arange(low, self.stop)])


def _blocks(slots: Slots, chunk: Chunk, first: int) -> list[_Block]:
    starts = range(max(chunk.start, chunk.exempt), chunk.stop, BLOCK)
    return [_Block(chunk, first, start, min(start + BLOCK, chunk.stop)) for start in starts]


def _stack(slots: Slots, blocks: list[_Block], new: int, device: torch.device | str) -> Windowed:
    """Pad the blocks to one size; older keys are gathered behind the ``new`` tokens."""
    window = slots.window
    seen = [block.keys(window.sink, window.recent) for block in blocks]
    size, width = max(b.stop - b.start for b in blocks), max(map(len, seen))
    query = torch.empty(len(blocks), size, dtype=torch.int64)
    key = torch.empty(len(blocks), width, dtype=torch.int64)
    visible = torch.zeros(len(blocks), 1, size, width, dtype=torch.bool)
    older, out, place = [], [], []
    count = 0
    for index, (block, positions) in enumerate(zip(blocks, seen, strict=True)):
        chunk = block.chunk
        queries = torch.arange(block.start, block.stop)
        rows = queries + (block.first - chunk.start)
        query[index] = rows[0]
        query[index, : len(rows)] = rows
        out.append(rows)
        place.append(torch.arange(len(rows)) + index * size)
        behind = positions[positions < chunk.start]
        if chunk.resumed:
            older.append(slots.staged(behind))
        else:
            older.append(slots.ring(torch.tensor(chunk.slot), behind))
        key[index] = rows[0]
        key[index, : len(behind)] = torch.arange(len(behind)) + (new + count)
        key[index, len(behind) : len(positions)] = positions[len(behind) :] + (block.first - chunk.start)
        count += len(behind)
        sees = window.sees(queries[:, None], positions)
        visible[index, 0, : len(rows), : len(positions)] = sees
        visible[index, 0, len(rows) :, 0] = True  # a padded query must see something
    older_rows = torch.cat(older)
    tensors = (query, key, visible, older_rows, torch.cat(out), torch.cat(place))
    return Windowed(*(tensor.to(device) for tensor in tensors))
