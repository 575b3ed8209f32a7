"""From a head mask to what an engine allocates: heads of each layer and rank, bytes, capacity.

A rank is one of ``tp`` tensor-parallel processes. Every rank holds equally many full heads of a layer, so one
capacity holds for all of them; the permutation chooses which heads a rank gets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from rlkv.errors import RLKVError
from rlkv.mask import HeadMask
from rlkv.rank import format_bytes
from rlkv.support import ModelShape
from rlkv.window import Window

Prefill = Literal["full", "local"]
LONGEST_PROMPT = 16384  # tokens, with prefill full and prompts in chunks, where nobody says more


@dataclass(frozen=True)
class Capacity:
    """What one rank allocates; ``tokens`` fit into its full heads, ``requests`` run at once.

    ``tokens`` counts all running requests together. ``staging`` tokens are the longest prompt that may be
    processed in chunks when prefill is "full". Sizes in bytes.
    """

    tokens: int
    requests: int
    staging: int
    full_bytes: int
    ring_bytes: int
    staging_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.full_bytes + self.ring_bytes + self.staging_bytes


@dataclass(frozen=True)
class Plan:
    """How one model is served with a head mask. Raises RLKVError where ranks can't hold equal numbers."""

    mask: HeadMask
    shape: ModelShape
    window: Window
    prefill: Prefill = "full"
    tp: int = 1
    bytes_per_value: int = 2  # of the KV cache

    def __post_init__(self) -> None:
        self.mask.check(self.shape)
        if self.prefill not in ("full", "local"):
            raise RLKVError(f"prefill must be full or local, got {self.prefill!r}")
        if self.tp < 1 or self.shape.kv_heads % self.tp:
            raise RLKVError(
                f"{self.shape.kv_heads} KV heads can't be split over tp={self.tp} ranks: choose a tp that "
                "divides them"
            )
        uneven = [layer for layer, full in enumerate(self.mask.per_layer()) if full % self.tp]
        if uneven:
            raise RLKVError(
                f"layer {uneven[0]} keeps {self.mask.per_layer()[uneven[0]]} full heads, which tp={self.tp} "
                f"ranks can't hold in equal numbers; make the mask with tp={self.tp}"
            )

    @cached_property
    def full_heads(self) -> tuple[int, ...]:
        """Full KV heads of each layer on one rank."""
        return tuple(full // self.tp for full in self.mask.per_layer())

    @cached_property
    def local_heads(self) -> tuple[int, ...]:
        """Local KV heads of each layer on one rank."""
        heads = self.shape.kv_heads // self.tp
        return tuple(heads - full for full in self.full_heads)

    @property
    def groups(self) -> int:
        """Query heads of a KV head."""
        return self.shape.query_heads // self.shape.kv_heads

    @property
    def compresses(self) -> bool:
        """Whether any head is local; if not, there is nothing to do."""
        return not bool(self.mask.full.all())

    @cached_property
    def order(self) -> torch.Tensor:
        """The head of the checkpoint at each new place: int64 [layers, kv_heads].

        Rank by rank, each with its full heads first; heads of a kind keep their order.
        """
        rows = []
        for full in self.mask.full:
            kept, dropped = full.nonzero()[:, 0], (~full).nonzero()[:, 0]
            rows.append(torch.cat([kept.reshape(self.tp, -1), dropped.reshape(self.tp, -1)], dim=1).flatten())
        return torch.stack(rows)

    @property
    def _head_bytes(self) -> int:
        """Bytes of one token in one KV head: key and value."""
        return 2 * self.shape.head_dim * self.bytes_per_value

    @property
    def full_token_bytes(self) -> int:
        """Bytes that a token takes for good on one rank: in its full heads."""
        return sum(self.full_heads) * self._head_bytes

    @property
    def local_token_bytes(self) -> int:
        """Bytes that a token takes in one rank's local heads, for as long as the window holds it."""
        return sum(self.local_heads) * self._head_bytes

    @property
    def stock_token_bytes(self) -> int:
        """Bytes of a token on one rank without a mask."""
        return self.full_token_bytes + self.local_token_bytes

    def request_bytes(self, length: int) -> int:
        """Bytes that a request of ``length`` tokens holds on one rank, its whole ring included."""
        return length * self.full_token_bytes + self.window.size * self.local_token_bytes

    def gain(self, length: int) -> float:
        """How many requests of ``length`` tokens fit where one fits without a mask."""
        return length * self.stock_token_bytes / self.request_bytes(length)

    def staging(self, prompt_tokens: int = 0) -> int:
        """Tokens of the longest prompt that may be processed in chunks, whose local heads are held whole.

        ``prompt_tokens``: what the user asks for (0: 16384), the context at most.
        """
        if self.prefill == "local" or not self.compresses:
            return 0
        longest = prompt_tokens or LONGEST_PROMPT
        return min(longest, self.shape.context_length or longest)

    def requests_for(self, budget: int, length: int, staging: int = 0) -> int:
        """Most requests of mean ``length`` tokens whose memory fits into ``budget`` bytes of one rank."""
        rest = budget - (self.window.size + staging) * self.local_token_bytes  # the padding ring
        return max(0, rest // self.request_bytes(length))

    def capacity(self, budget: int, requests: int, staging: int = 0) -> Capacity:
        """Split ``budget`` bytes of one rank: rings of ``requests``, ``staging`` tokens, the rest for tokens.

        One ring more than there are requests: padding rows of a batch write there. Raises RLKVError when
        less than one token a request is left; the parts never exceed the budget.
        """
        ring = (requests + 1) * self.window.size * self.local_token_bytes
        stage = staging * self.local_token_bytes
        left = budget - ring - stage
        if left < requests * self.full_token_bytes or left <= 0:
            raise RLKVError(
                f"{format_bytes(budget)} for the KV cache are too few for {requests} requests: the windows "
                f"of their local heads take {format_bytes(ring)} and the staging area of {staging} prompt "
                f"tokens {format_bytes(stage)}; allow fewer running requests, shorter prompts or more memory"
            )
        # with no full head at all a token costs nothing for good; the context then bounds each request
        limit = requests * (self.shape.context_length or 2**20)
        tokens = left // self.full_token_bytes if self.full_token_bytes else limit
        return Capacity(tokens, requests, staging, tokens * self.full_token_bytes, ring, stage)
