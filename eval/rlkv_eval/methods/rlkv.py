"""RLKV: heads ranked by gates that were trained with reinforcement learning on the model's own reasoning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rlkv.errors import RLKVError
from rlkv.gates import HeadGates
from rlkv_eval.methods.base import Context
from rlkv_eval.methods.heads import HeadGenerator, masked


@dataclass
class RLKV:
    """``gates``: a gates folder or table, published or trained here (empty: those given to the run)."""

    gates: str = ""

    name: ClassVar[str] = "rlkv"
    title: ClassVar[str] = "RLKV"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.08525"

    def build(self, context: Context, sparsity: float) -> HeadGenerator:
        """Highest gates full. RLKVError without gates, or with gates of another model."""
        gates = HeadGates.load(self.gates) if self.gates else context.gates
        if gates is None:
            raise RLKVError(
                "method rlkv: no gates; give gates=FOLDER (trained by `rlkv train`, or published)"
            )
        gates.check(context.model)
        return masked(context, self.name, gates.values, sparsity)
