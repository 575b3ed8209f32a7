"""Random heads: the ranking that knows nothing, which every head method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rlkv.mask import HeadMask
from rlkv_eval.methods.base import Context
from rlkv_eval.methods.heads import HeadGenerator, recorded


@dataclass
class RandomHeads:
    """Heads made local at random; ``draw`` numbers the masks of one seed."""

    draw: int = 0

    name: ClassVar[str] = "random"
    title: ClassVar[str] = "Random heads"
    paper: ClassVar[str] = ""

    def build(self, context: Context, sparsity: float) -> HeadGenerator:
        """The mask that ``rlkv eval`` draws with the same seed."""
        shape, seed = context.shape, context.seed * 1_000_003 + self.draw
        mask = HeadMask.random(shape.layers, shape.kv_heads, sparsity, seed, **recorded(context))
        return HeadGenerator(self.name, mask, context)
