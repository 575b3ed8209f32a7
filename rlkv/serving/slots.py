"""Where a local head's tokens live: a ring a request, and one staging area for a prompt processed in chunks.

A request owns the ring of its request slot, for as long as it owns that slot: nothing is allocated, looked up
or guessed. Rows of one tensor [rows, heads, head_dim] a layer: ring 0 takes the padding rows of a batch, ring
r belongs to request slot r (1 to ``requests``), the staging area comes last.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from rlkv.errors import RLKVError
from rlkv.window import Window


@dataclass(frozen=True)
class Slots:
    """Rows of rings and staging area: pure arithmetic, on any device, usable in a CUDA graph."""

    window: Window
    requests: int
    staging: int = 0

    @property
    def rows(self) -> int:
        return self.staging_start + self.staging

    @property
    def staging_start(self) -> int:
        return (self.requests + 1) * self.window.size

    def ring(self, request: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Row of a token in its request's ring: integer tensors that broadcast, gives int64."""
        return request.long() * self.window.size + self.window.slot(position.long())

    def held(self, request: torch.Tensor, length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [B, size] that requests of ``length`` [B] tokens hold, and which of them are filled, bool.

        Unfilled ones are replaced by the first, so that whatever is read is the request's own.
        """
        slot = torch.arange(self.window.size, device=request.device)
        filled = slot < length.long()[:, None]
        return request.long()[:, None] * self.window.size + torch.where(filled, slot, 0), filled

    def staged(self, position: torch.Tensor) -> torch.Tensor:
        """Row of a prompt token in the staging area."""
        return position + self.staging_start


class Staging:
    """Whose prompt the staging area holds, and how much of it: at most one request's at a time."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.owner: Hashable = None
        self.filled = 0

    def resume(self, request: Hashable, start: int) -> None:
        """The request goes on at token ``start``, which is what the area must hold; RLKVError if not."""
        if self.owner != request or self.filled != start:
            raise RLKVError(
                f"staging area: request {request!r} goes on at token {start}, but the area holds "
                f"{self.filled} tokens of {self.owner!r}; only one prompt can be processed in chunks at once"
            )

    def fill(self, request: Hashable, stop: int) -> None:
        """The first ``stop`` tokens of a prompt are in; the area is taken over from whoever had it."""
        if stop > self.tokens:
            raise RLKVError(
                f"staging area: a prompt of more than {stop} tokens is processed in chunks, but there is "
                f"room for {self.tokens}; raise prompt_tokens, or prefill prompts in one piece"
            )
        self.owner, self.filled = request, stop

    def release(self, request: Hashable) -> None:
        """The request's prompt is complete."""
        if self.owner == request:
            self.owner, self.filled = None, 0
