"""Choosing tokens: temperature, top-k, top-p, and random numbers that belong to a request, not to a batch.

Each draw is a hash of (seed, request index, how many tokens the request has): a completion is the same
whichever slot or batch it ran in, and nothing but plain tensor arithmetic runs on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlkv.errors import RLKVError
from rlkv.kernels import available


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 keep every token.

    ``stop_ids`` empty means the end-of-sequence ids of the model's generation config. ``streams``: for each
    request the number of its random stream under ``seed`` (empty: its place in the list), so that a request
    draws the same numbers whatever else is asked for.
    """

    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    streams: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise RLKVError(f"sampling: max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise RLKVError(f"sampling: temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise RLKVError(f"sampling: top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise RLKVError(f"sampling: top_k must be 0 (off) or more, got {self.top_k}")

    def keeps_all(self, vocabulary: int) -> bool:
        """Whether neither top-k nor top-p excludes a token."""
        return self.top_p == 1 and not 0 < self.top_k < vocabulary

    def keys(self, requests: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """int64 [requests] keys of the requests' random streams; RLKVError for another number of streams."""
        if self.streams and len(self.streams) != requests:
            raise RLKVError(f"sampling: {len(self.streams)} random streams for {requests} requests")
        numbers = torch.tensor(self.streams or range(requests), dtype=torch.int64, device=device)
        return request_keys(self.seed, numbers)


def _signed(value: int) -> int:
    """The same 64 bits as a signed integer, which is what torch.int64 holds."""
    return value - 2**64 if value >= 2**63 else value


CHUNK = 128  # tokens; vocabularies of its square and less are searched at once

_STEP = _signed(0x9E3779B97F4A7C15)  # splitmix64 (Steele, Lea and Flood 2014)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shifted(bits: torch.Tensor, by: int) -> torch.Tensor:
    """Logical right shift of int64, whose own shift repeats the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """One splitmix64 output for each int64 state; products wrap."""
    bits = bits * _STEP + _STEP
    bits = (bits ^ _shifted(bits, 30)) * _MIX_1
    bits = (bits ^ _shifted(bits, 27)) * _MIX_2
    return bits ^ _shifted(bits, 31)


def request_keys(seed: int, indices: torch.Tensor) -> torch.Tensor:
    """int64 [N] keys of the random streams of requests ``indices`` (int64 [N]) under ``seed``."""
    start = _mix(torch.full_like(indices, _signed(seed % 2**64)))
    return _mix(start + indices)


def uniform(keys: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """float64 [N] in [0, 1): draw number ``counts`` (int64 [N]) of each stream ``keys`` (int64 [N])."""
    # 48 bits, so that u times a total is always below the total
    return _shifted(_mix(keys + counts), 16).double() * 2.0**-48


def choose(
    logits: torch.Tensor, params: SamplingParams, keys: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next token int64 [N] and its log-probability float32 [N] from ``logits`` [N, V].

    The log-probability is under softmax(logits / temperature) over the whole vocabulary, before top-k and
    top-p; greedy uses temperature 1. The trainer's log-probabilities are at the same temperature.
    """
    if logits.is_cuda and params.temperature > 0 and params.keeps_all(logits.shape[-1]) and available():
        from rlkv.kernels.vocabulary import draw

        return draw(logits.contiguous(), keys, counts, params.temperature, (_STEP, _MIX_1, _MIX_2))
    logits = logits.float()
    if params.temperature not in (0.0, 1.0):
        logits = logits / params.temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    greedy = params.temperature == 0
    token = logprobs.argmax(-1) if greedy else _draw(logprobs, params, uniform(keys, counts))
    return token, logprobs.gather(-1, token[:, None])[:, 0]


def _draw(logprobs: torch.Tensor, params: SamplingParams, draws: torch.Tensor) -> torch.Tensor:
    """Invert the distribution function at ``draws``; float64, as a parallel float32 sum is not monotone."""
    vocabulary = logprobs.shape[-1]
    if params.keeps_all(vocabulary):
        if vocabulary > CHUNK * CHUNK:
            return _draw_in_two_levels(logprobs.exp(), draws)
        total = logprobs.exp().cumsum(-1, dtype=torch.float64)
        return _invert(total, total[:, -1:], draws)
    top_k = params.top_k if 0 < params.top_k < vocabulary else vocabulary
    ranked, order = logprobs.topk(top_k, dim=-1) if top_k < vocabulary else logprobs.sort(-1, descending=True)
    total = ranked.double().softmax(-1).cumsum(-1)
    # top-p keeps the smallest set that reaches top_p: a token stays if those before it fall short
    kept = 1 + (total[:, :-1] < params.top_p).sum(-1, keepdim=True)
    rank = _invert(total, total.gather(-1, kept - 1), draws)
    return order.gather(-1, torch.minimum(rank[:, None], kept - 1))[:, 0]


def _draw_in_two_levels(mass: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The same for large vocabularies: first a chunk of them, then a token of it.

    A running sum over a whole row occupies one multiprocessor of a GPU; sums of chunks occupy all.
    """
    chunks = torch.nn.functional.pad(mass, (0, -mass.shape[-1] % CHUNK)) if mass.shape[-1] % CHUNK else mass
    chunks = chunks.view(len(mass), -1, CHUNK)
    sums = chunks.sum(-1, dtype=torch.float64)
    total = sums.cumsum(-1)
    chunk = _invert(total, total[:, -1:], draws)[:, None]
    within = chunks.gather(1, chunk[..., None].expand(-1, -1, CHUNK))[:, 0].cumsum(-1, dtype=torch.float64)
    left = draws[:, None] * total[:, -1:] - (total.gather(-1, chunk) - sums.gather(-1, chunk))
    # rounding must not carry the draw past the chunk's last token of any mass
    left = torch.minimum(left, within[:, -1:] * (1 - 2.0**-50))
    return chunk[:, 0] * CHUNK + (within <= left).sum(-1)


def _invert(total: torch.Tensor, mass: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """First column whose cumulative mass is above ``draws`` of ``mass``: a token of no mass is never it."""
    passed = (total <= draws[:, None] * mass).sum(-1)
    return passed.clamp(max=total.shape[-1] - 1)
