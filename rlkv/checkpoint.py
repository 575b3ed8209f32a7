"""Checkpoints that a killed run can always go on from.

A checkpoint is one small file, written beside its final name and moved there in one step: a run killed at any
moment leaves the last complete one. It holds gates, optimiser, controller, step, random states, best gates
and how many bytes of metrics.jsonl belong to it.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlkv.errors import RLKVError

FORMAT = 1


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write ``step-<step>.pt`` and delete all but the newest ``keep``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:06d}.pt"
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    for old in found(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def found(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def load_last(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint's state, or None without one; RLKVError if it cannot be read."""
    paths = found(folder)
    if not paths:
        return None
    try:
        state = torch.load(paths[-1], map_location="cpu", weights_only=False)
        if state["format"] != FORMAT:
            raise RLKVError(f"{paths[-1]}: checkpoint format {state['format']}, this version reads {FORMAT}")
    except RLKVError:
        raise
    except Exception as error:  # torch and pickle raise many types for a damaged file
        raise RLKVError(
            f"{paths[-1]} cannot be read ({type(error).__name__}); delete it to go on from the one before"
        ) from None
    return state


def random_states() -> dict[str, Any]:
    """Of Python, NumPy and torch, for rewards and samplers that draw from them."""
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """The inverse of ``random_states``; GPU states only where the same number of GPUs is there."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    cuda = states.get("cuda", [])
    if torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)
