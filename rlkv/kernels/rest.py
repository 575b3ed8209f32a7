"""Causal attention over the far keys, those that the window hides, by the fastest library kernel.

Query i sees the far keys sink <= j <= i - recent, that is j - sink <= i - (sink + recent): in a sequence of n
tokens this is plain square causal attention of the queries from sink + recent on over the keys from sink to
n - recent. So full attention is the far pass merged with the local one by their log-sums, and no key is
ever computed twice. The backward pass of each part takes the output and the log-sum of the whole, as in ring
attention (Liu et al. 2023, arXiv 2310.01889).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from rlkv.window import Window

States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # query [T, Hq, D], key and value [T, Hkv, D]
FEW = 64  # far queries that cuDNN isn't asked for
GAP = 512  # rows at most of the idle stretches between sequences, which cost their square


@dataclass(frozen=True)
class FarResult:
    """Means over the far keys and log-sums; ``output[base + position]``, see :class:`FarPass`."""

    output: torch.Tensor  # [rows, Hq, D]
    log: torch.Tensor  # float32, natural; the caller turns it into the log-sum over all keys, in place
    log_strides: tuple[int, int, int]  # of sequence, row and head
    context: Any = None


@dataclass
class FarPass:
    """The far pass of a packed row of sequences of the given ``lengths``.

    ``bases``: for each sequence, what to add to a position to find its row among the outputs (and query
    gradients), the log-sums, the key gradients. "dense" is one batch of equal sequences for cuDNN, the
    fastest, which prepares a plan for every new shape (0.1 s) and gave wrong gradients in its ragged form
    (PyTorch 2.11); "ragged" is FlashAttention-2, where the rows without far keys are idle sequences of their
    own. Nothing is copied either way.
    """

    lengths: Sequence[int]
    window: Window
    device: torch.device
    mode: str = field(init=False)
    bases: list[tuple[int, int, int]] = field(init=False)

    def __post_init__(self) -> None:
        size, sink = self.window.size, self.window.sink
        starts = [0, *accumulate(self.lengths)][:-1]
        self.bases = [(start, start, start) for start in starts]
        longest = max(self.lengths)
        if longest <= size:
            self.mode = "none"
        elif self.device.type != "cuda":
            self.mode = "plain"
        elif len(set(self.lengths)) == 1 and longest - size >= FEW and torch.backends.cudnn.is_available():
            self.mode = "dense"
            far = longest - size
            self.bases = [(doc * far - size, -size, doc * far - sink) for doc in range(len(self.lengths))]
        else:
            self.mode = "ragged"
            cumulative = _idle_between(self.lengths, self.window)
            most = (int(edges.diff().max()) for edges in cumulative)
            self._ragged = (*(edges.to(self.device) for edges in cumulative), *most, 0.0, True)

    def forward(self, states: States, scaling: float) -> FarResult:
        """Attention over the far keys; rows without any hold anything."""
        query, key, value = states
        heads = query.shape[1]
        if self.mode == "dense":
            inputs = self._dense(*states)
            found = torch.ops.aten._scaled_dot_product_cudnn_attention(
                *inputs, None, True, 0.0, True, False, scale=scaling
            )
            output, log = found[0].transpose(1, 2).flatten(0, 1), found[1]
            far = inputs[0].shape[2]
            return FarResult(output, log, (heads * far, 1, far), (log, found[6], found[7]))
        if self.mode == "ragged":
            found = torch.ops.aten._flash_attention_forward(*states, *self._ragged, False, scale=scaling)
            log = found[1].T  # [T, Hq]
            return FarResult(found[0], log, (0, *log.stride()), (log, found[2], found[3]))
        output, log = _plain_forward(states, self.lengths, self.window, scaling)
        return FarResult(output, log, (0, heads, 1), (log,))

    def backward(
        self, states: States, gradient: torch.Tensor, output: torch.Tensor, context: Any, scaling: float
    ) -> States:
        """Gradients [rows, heads, D] from the far keys, given the whole's ``output`` and log-sum."""
        log = context[0]
        if self.mode == "dense":
            query, key, value = self._dense(*states)
            grad, whole = self._queries(gradient), self._queries(output)
            found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
                grad, query, key, value, whole, log, context[1], context[2], None, None, None,
                query.shape[2], key.shape[2], 0.0, True, scale=scaling,
            )  # fmt: skip
            query_grad, key_grad, value_grad = (part.transpose(1, 2).flatten(0, 1) for part in found)
            return query_grad, key_grad, value_grad
        if self.mode == "ragged":
            return torch.ops.aten._flash_attention_backward(
                gradient, *states, output, log.T.contiguous(), *self._ragged, *context[1:], scale=scaling
            )
        return _plain_backward(states, gradient, output, log, self.lengths, self.window, scaling)

    def _queries(self, states: torch.Tensor) -> torch.Tensor:
        """[T, H, D] -> [docs, H, far, D]."""
        return states.unflatten(0, (len(self.lengths), -1))[:, self.window.size :].transpose(1, 2)

    def _dense(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> States:
        sink, stop = self.window.sink, self.lengths[0] - self.window.recent
        keys, values = (
            states.unflatten(0, (len(self.lengths), -1))[:, sink:stop].transpose(1, 2)
            for states in (key, value)
        )
        return self._queries(query), keys, values


def _idle_between(lengths: Sequence[int], window: Window) -> tuple[torch.Tensor, torch.Tensor]:
    """Cumulative lengths (int32) of queries and keys: far parts, and idle sequences that fill the gaps."""
    queries, keys, start = [0], [0], 0
    for length in lengths:
        if length > window.size:
            gap = start + window.size - queries[-1]
            pieces = -(-gap // GAP)
            last_query, last_key = queries[-1], keys[-1]
            for piece in range(1, pieces + 1):
                queries.append(last_query + gap * piece // pieces)
                keys.append(last_key + (start + window.sink - last_key) * piece // pieces)
            queries.append(start + length)
            keys.append(start + length - window.recent)
        start += length
    return torch.tensor(queries, dtype=torch.int32), torch.tensor(keys, dtype=torch.int32)


def _far(states: torch.Tensor, start: int, stop: int, groups: int) -> torch.Tensor:
    """[T, H, D] -> float [H * groups, stop - start, D]."""
    return states[start:stop].transpose(0, 1).repeat_interleave(groups, 0).float()


def _plain_forward(
    states: States, lengths: Sequence[int], window: Window, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value = states
    groups = query.shape[1] // key.shape[1]
    output = torch.full_like(query, torch.nan, memory_format=torch.contiguous_format)
    log = torch.full(query.shape[:2], torch.nan, device=query.device)
    start = 0
    for length in lengths:
        if length > window.size:
            rows = slice(start + window.size, start + length)
            first, last = start + window.sink, start + length - window.recent
            scores = _far(query, rows.start, rows.stop, 1) @ _far(key, first, last, groups).mT * scaling
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
            output[rows] = (
                (scores.softmax(-1) @ _far(value, first, last, groups)).transpose(0, 1).to(output.dtype)
            )
            log[rows] = scores.logsumexp(-1).T
        start += length
    return output, log


def _plain_backward(
    states: States,
    gradient: torch.Tensor,
    output: torch.Tensor,
    log: torch.Tensor,
    lengths: Sequence[int],
    window: Window,
    scaling: float,
) -> States:
    query, key, value = states
    heads = key.shape[1]
    groups = query.shape[1] // heads
    found = tuple(torch.full(part.shape, torch.nan, dtype=part.dtype) for part in states)
    start = 0
    for length in lengths:
        if length > window.size:
            first, last = start + window.sink, start + length - window.recent
            rows = slice(start + window.size, start + length)
            queries, grads = _far(query, rows.start, rows.stop, 1), _far(gradient, rows.start, rows.stop, 1)
            keys, values = _far(key, first, last, groups), _far(value, first, last, groups)
            weights = (queries @ keys.mT * scaling - log[rows].T[..., None]).exp().tril()
            delta = (grads * _far(output, rows.start, rows.stop, 1)).sum(-1, keepdim=True)
            slope = weights * (grads @ values.mT - delta) * scaling
            found[0][rows] = (slope @ keys).transpose(0, 1).to(query.dtype)
            for target, part in ((found[1], slope.mT @ queries), (found[2], weights.mT @ grads)):
                target[first:last] = (
                    part.unflatten(0, (heads, groups)).sum(1).transpose(0, 1).to(target.dtype)
                )
        start += length
    return found[0], found[1], found[2]
