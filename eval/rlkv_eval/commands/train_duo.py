"""``rlkv-eval train-duo``: DuoAttention's gates, trained its own way."""

from __future__ import annotations

from rlkv_eval.methods.train_duo import POSITIONAL, run
from rlkv_eval.methods.train_duo import TrainDuoConfig as Config

__all__ = ["POSITIONAL", "Config", "run"]
