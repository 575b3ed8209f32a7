"""What a local head sees: the one definition that masks, caches, samplers and engines derive from.

Query i sees key j iff j <= i and (j < sink or i - j < recent); positions count from a sequence's first
real token. The query's own key counts in ``recent``. The authors' evaluator keeps 16 + 64 cached keys and
adds the new one, so their published "64" is ``recent=65`` here (docs/window.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlkv.errors import RLKVError


@dataclass(frozen=True)
class Window:
    """``sink`` tokens at the start of the sequence and ``recent`` tokens at its end (both in tokens)."""

    sink: int
    recent: int

    def __post_init__(self) -> None:
        if self.sink < 0:
            raise RLKVError(f"window: sink must be 0 or more, got {self.sink}")
        if self.recent < 1:
            raise RLKVError(
                f"window: recent must be 1 or more, got {self.recent}: it counts the query's own key, "
                "so with 0 a local head would see nothing"
            )

    @property
    def size(self) -> int:
        """Most tokens that a local head ever holds."""
        return self.sink + self.recent

    def held(self, length: int) -> int:
        """Tokens a local head holds after ``length`` tokens."""
        return min(length, self.size)

    def sees(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether each query position sees each key position; integer tensors that broadcast, gives bool."""
        return (key <= query) & ((key < self.sink) | (query - key < self.recent))

    def slot(self, position: torch.Tensor) -> torch.Tensor:
        """Ring slot in [0, size) of a token position: sink tokens stay, the others take turns."""
        ring = self.sink + (position - self.sink) % self.recent
        return torch.where(position < self.sink, position, ring)

    def held_positions(self, last: torch.Tensor) -> torch.Tensor:
        """The position in each ring slot once position ``last`` is stored: int64 [..., size], -1 for none.

        ``last`` int64 [..., 1], negative while a sequence is empty.
        """
        slot = torch.arange(self.size, device=last.device)
        sink = slot < self.sink
        latest = last - (last - slot) % self.recent  # the newest position whose turn the slot is
        held = torch.where(sink, slot, latest)
        return held.masked_fill((held > last) | (~sink & (held < self.sink)), -1)

    def __str__(self) -> str:
        return f"{self.sink}+{self.recent}"

    @classmethod
    def parse(cls, text: str) -> Window:
        """Read ``"16+64"``; RLKVError for anything else, a number in a card, say."""
        try:
            sink, recent = (int(part) for part in str(text).split("+"))
        except ValueError:
            raise RLKVError(f"window: expected SINK+RECENT such as 16+64, got {text!r}") from None
        return cls(sink, recent)
