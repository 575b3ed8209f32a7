"""The settings of DuoAttention's gate training; the defaults are the authors' script."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlkv.errors import RLKVError
from rlkv.window import Window
from rlkv_eval.methods.passkeys import Style


@dataclass
class TrainDuoConfig:
    """What ``rlkv-eval train-duo`` takes; lengths are in tokens."""

    model: str = ""  # hub id, local folder, or pocket
    output: str = "gates/duo"  # folder for gates, card, metrics, checkpoints
    window: Window | None = None  # sink+recent tokens of a local head (none: 128+256, the paper)

    style: Style = "auto"  # passkeys (words), pairs (for character-level tokenizers), auto (by the tokenizer)
    haystack: Path | None = None  # text file that the passkeys hide in (none: made-up sentences)
    passkeys: int = 10  # in one context
    words: int = 32  # of a passkey
    context_min: int = 1000  # shortest context; pairs have their own lengths
    context_max: int = 32000  # longest context
    lengths: int = 50  # steps between them

    steps: int = 2000  # optimiser steps
    rows: int = 1  # contexts a step
    learning_rate: float = 0.02  # AdamW
    penalty: float = 0.05  # times the mean gate
    gradient_checkpointing: bool = False  # less memory, one more forward

    seed: int = 0  # of the contexts
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the model (auto: float32 on a CPU)
    device: str = "auto"  # auto, cpu, cuda, ...
    resume: bool = False  # go on from the last checkpoint in the output folder, if there is one
    checkpoint_every: int = 50  # steps
    keep_checkpoints: int = 2  # how many

    def check(self) -> None:
        """Raise RLKVError for a value that cannot be meant."""
        for name in ("steps", "rows", "learning_rate", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) <= 0:
                raise RLKVError(f"train-duo: {name} must be above 0, got {getattr(self, name)}")
        if self.penalty < 0:
            raise RLKVError(f"train-duo: penalty must be 0 or more, got {self.penalty}")

    def learning_rate_at(self, step: int) -> float:
        """Of step number ``step`` (from 0): a tenth at least, whole between the first and the last fifth."""
        ramp = max(1, self.steps // 5)
        rise, fall = (step + 1) / ramp, (self.steps - step) / ramp
        return self.learning_rate * min(1.0, max(rise, 0.1), max(fall, 0.1))
