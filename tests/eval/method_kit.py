"""A context for methods to work in: a tiny random model, or the pocket reasoner, and problems."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny

from rlkv import pocket
from rlkv.gates import HeadGates
from rlkv.pocket.tokenizer import VOCABULARY, build_tokenizer
from rlkv.window import Window
from rlkv_eval.methods import Context
from rlkv_eval.tasks.base import Item

torch.set_num_threads(1)
WINDOW = Window(2, 6)


def items(task: str, count: int, split: str = "dev") -> list[Item]:
    """Problems of the pocket reasoner; ``task`` is recall, resolve, search or ledger."""
    return [
        Item(row["id"], row["prompt"], row["answer"], f"pocket_{task}")
        for row in pocket.problems(task, split, count)
    ]


@lru_cache(maxsize=2)
def pocket_model() -> tuple[Any, Any]:
    return pocket.load()


def tiny_context(work: Path, kind: str = "qwen3", seed: int = 0, **changes: Any) -> Context:
    """3 layers of 3 KV heads under 6 query heads; the pocket's tokenizer."""
    tokenizer = build_tokenizer()
    model = tiny(kind, seed=seed, vocab_size=len(VOCABULARY), eos_token_id=tokenizer.eos_token_id)
    gates = HeadGates(torch.rand(3, 3, generator=torch.Generator().manual_seed(seed)))
    return context_of(model, tokenizer, work, WINDOW, gates, **changes)


def pocket_context(work: Path, **changes: Any) -> Context:
    model, tokenizer = pocket_model()
    return context_of(model, tokenizer, work, pocket.WINDOW, None, **changes)


def context_of(
    model: Any, tokenizer: Any, work: Path, window: Window, gates: HeadGates | None, **changes: Any
) -> Context:
    settings: dict[str, Any] = {
        "prefill": "full",
        "slots": 8,
        "max_length": 400,
        "seed": 0,
        "gates": gates,
        "calibration": items("recall", 4),
        "work": work,
    }
    return Context(model, tokenizer, window, **(settings | changes))
