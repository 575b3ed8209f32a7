"""What a token-dropping method decides: which tokens of a KV head go first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass
class View:
    """One layer's cells of some slots: n slots, H KV heads, C cells; integers are int64 [n, 1, 1].

    ``keys`` [n, H, D, C] with RoPE at their true positions; ``positions`` int32 [n, H, C] are those;
    ``score`` float32 [n, H, C] is the policy's own. Only the first ``held`` cells of a slot count.
    """

    layer: int
    keys: torch.Tensor
    positions: torch.Tensor
    score: torch.Tensor
    held: torch.Tensor
    length: torch.Tensor  # tokens of the request so far, one that is just coming in included
    prompt: torch.Tensor  # of these, the prompt's
    budget: torch.Tensor  # tokens that a head holds at this length
    stream: torch.Tensor  # the request's own random stream

    @property
    def empty(self) -> torch.Tensor:
        """Bool [n, 1, C]: cells that hold nothing."""
        return torch.arange(self.positions.shape[-1], device=self.held.device) >= self.held

    def newest(self, count: torch.Tensor | int) -> torch.Tensor:
        """Bool [n, H, C]: tokens among the ``count`` last of the request."""
        return self.positions >= self.length - count


class Policy(ABC):
    """Override ``priority``; the others for methods that look at attention."""

    @abstractmethod
    def priority(self, view: View) -> torch.Tensor:
        """Float32 [n, H, C]: cells of low priority go first. What empty cells get is ignored."""

    def victim(self, view: View) -> torch.Tensor:
        """int64 [n, H, 1]: the cell whose token makes room for the next one."""
        return self.priority(view).masked_fill(view.empty, torch.inf).argmin(-1, keepdim=True)

    def see_prompt(
        self, query: torch.Tensor, key: torch.Tensor, lengths: torch.Tensor, scaling: float
    ) -> torch.Tensor | None:
        """Scores float32 [n, H, T] of a prompt's tokens, all but its last; None for 0.

        query [n, Hq, T, D] and key [n, H, T, D] are right-padded; ``lengths`` int64 [n] of the whole prompts
        (the last token comes like a completion's: ``see_step``).
        """
        return None

    def see_step(self, view: View, scores: torch.Tensor, weights: torch.Tensor) -> None:
        """Update ``view.score`` in place. scores (scaled, -inf where empty), weights: [n, H, groups, C]."""
        return  # for methods that need no attention
