"""DuoAttention: heads ranked by gates that were trained to keep the hidden states of passkey retrieval."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from rlkv.gates import HeadGates
from rlkv_eval.methods.base import Context
from rlkv_eval.methods.heads import HeadGenerator, masked
from rlkv_eval.methods.scores import cached_scores
from rlkv_eval.methods.train_duo import TrainDuoConfig, train_duo


@dataclass
class DuoAttention:
    """``gates``: a folder or table, published or of ``rlkv-eval train-duo``; empty: trained now, and kept.

    Training uses the window of the run unless ``training.window`` names one.
    """

    gates: str = ""
    training: TrainDuoConfig = field(default_factory=TrainDuoConfig)

    name: ClassVar[str] = "duo"
    title: ClassVar[str] = "DuoAttention"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.10819"

    def build(self, context: Context, sparsity: float) -> HeadGenerator:
        """Highest gates full. RLKVError for gates of another model."""
        return masked(context, self.name, self.scores(context).values, sparsity)

    def scores(self, context: Context) -> HeadGates:
        """The gates, read or trained."""
        if self.gates:
            gates = HeadGates.load(self.gates)
            gates.check(context.model)
            return gates
        window = self.training.window or context.window

        def compute(folder: Path) -> HeadGates:
            config = replace(self.training, output=str(folder), window=window, resume=True)
            print(f"duo: training gates for {config.steps} steps in {folder}")
            return train_duo(config, context.model, context.tokenizer)

        return cached_scores(context, self, compute)
