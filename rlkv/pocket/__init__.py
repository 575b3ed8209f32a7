"""The pocket reasoner: a small reasoning model with its tasks, so that everything runs for real, offline.

    model, tokenizer = rlkv.pocket.load()
    problems("resolve", "test", 100)                   # dicts: prompt, answer, id, task

A 4.8 M parameter Qwen3 (6 layers, 32 query and 16 KV heads of 16) trained from scratch by ``pretrain.py``;
its card and training log lie beside the weights. Every figure about it uses one window, 4 + 16.
"""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from rlkv.errors import RLKVError
from rlkv.pocket.tasks import REASONING, TASKS, Example, examples
from rlkv.window import Window

__all__ = ["REASONING", "TASKS", "WINDOW", "Example", "examples", "load", "problems", "weights_folder"]

WINDOW = Window(4, 16)


def weights_folder() -> Path:
    """The shipped weights, or the folder that the environment variable RLKV_POCKET names."""
    return Path(os.environ.get("RLKV_POCKET") or Path(__file__).parent / "weights")


def load(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model, tokenizer) in ordinary transformers classes; RLKVError when the weights are not there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = weights_folder()
    if not (folder / "model.safetensors").is_file():
        raise RLKVError(f"the pocket reasoner's weights are not in {folder}; reinstall, or set RLKV_POCKET")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)


def problems(task: str, split: str, n: int, seed: int = 0) -> list[dict[str, str]]:
    """``n`` distinct problems of one task; split train, dev or test (disjoint by the prompt's hash)."""
    return [
        {"prompt": example.prompt, "answer": example.answer, "id": f"{task}-{example.id}", "task": task}
        for example in islice(examples(task, split, seed), n)
    ]
