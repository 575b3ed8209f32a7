"""What a training run leaves in its folder, and what it may go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlkv import checkpoint
from rlkv.config import plain
from rlkv.errors import RLKVError
from rlkv.gates import HeadGates
from rlkv.penalty import gate_sparsity
from rlkv.settings import TrainConfig
from rlkv.support import ModelShape

# Settings that a resumed run may change: they alter how it is run or how long, not what a step computes.
FREE = {"resume", "output", "slots", "device", "epochs", "steps", "patience", "tensorboard"}
FREE |= {"checkpoint_every", "keep_checkpoints"}


def checkpoints(config: TrainConfig) -> Path:
    return Path(config.output) / "checkpoints"


def last_state(config: TrainConfig) -> dict[str, Any] | None:
    """The checkpoint to go on from, or None; RLKVError if there is one, unasked for or of other settings."""
    state = checkpoint.load_last(checkpoints(config))
    if state is None:
        return None
    if not config.resume:
        raise RLKVError(
            f"{config.output} already holds a run at step {state['step']}: give resume=true to go on, "
            "or another output"
        )
    for name, value in plain(config).items():
        old = state["config"].get(name, value)
        if name not in FREE and old != value:
            raise RLKVError(f"resume: the run in {config.output} had {name}={old}, now it is {value}")
    return state


def write_gates(
    folder: Path, values: torch.Tensor, shape: ModelShape, config: TrainConfig, steps: int, **facts: Any
) -> HeadGates:
    """gates.tsv and card.json in ``folder``; ``values`` [layers, kv_heads] after ``steps`` steps."""
    gates = HeadGates(values, window=config.window, model=shape)
    gates.save(
        folder,
        prefill=config.prefill,
        deploy_window=str(config.deploy_window or config.window),
        steps=steps,
        seed=config.seed,
        sparsity=gate_sparsity(values),
        config=plain(config),
        **facts,
    )
    return HeadGates.load(folder)
