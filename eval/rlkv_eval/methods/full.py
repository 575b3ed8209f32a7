"""The base model with its whole KV cache: what every other method is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rlkv.errors import RLKVError
from rlkv.mask import HeadMask
from rlkv_eval.methods.base import Context
from rlkv_eval.methods.heads import HeadGenerator, recorded


@dataclass
class Full:
    """Every head full."""

    name: ClassVar[str] = "full"
    title: ClassVar[str] = "Full cache"
    paper: ClassVar[str] = ""

    def build(self, context: Context, sparsity: float = 0.0) -> HeadGenerator:
        """The full cache; RLKVError for a sparsity other than 0."""
        if sparsity:
            raise RLKVError(f"the full cache has sparsity 0; got {sparsity}")
        shape = context.shape
        mask = HeadMask.random(shape.layers, shape.kv_heads, 0.0, context.seed, **recorded(context))
        return HeadGenerator(self.name, mask, context)
