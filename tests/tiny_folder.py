"""A tiny random model as users have one: a folder with weights, tokenizer and template; problems in JSONL."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny_models import tiny

from rlkv.bench import EvalConfig
from rlkv.data import Problem
from rlkv.gates import HeadGates
from rlkv.pocket.tokenizer import VOCABULARY, build_tokenizer
from rlkv.support import check_model
from rlkv.window import Window

WINDOW = Window(2, 6)


def parity(text: str, problem: Problem) -> float:
    """A made-up verdict that depends on every token, so that different answers score differently."""
    return float(sum(map(ord, text)) % 2 == 0)


parity.grades_truncated = True  # type: ignore[attr-defined]


def save_model(folder: Path, kind: str = "qwen3", **shape: int) -> Path:
    """Context 256 tokens, 3 layers of 3 KV heads; answers end at the tokenizer's <eos>."""
    tokenizer = build_tokenizer()
    model = tiny(
        kind,
        vocab_size=len(VOCABULARY),
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        **shape,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_problems(path: Path, count: int = 5, start: int = 0) -> Path:
    """Prompts of different lengths, of two tasks that take turns."""
    rows = [
        {
            "prompt": "search " + "ab=12;" * (1 + index % 4) + f"a={index:02}",
            "answer": f"{index:02}",
            "id": str(index),
            "task": ("odd", "even")[index % 2 == 0],
        }
        for index in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_gates(folder: Path, model: Path, seed: int = 0) -> Path:
    """Random gates for the saved model, with its card."""
    from transformers import AutoConfig

    shape = check_model(AutoConfig.from_pretrained(model))
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(shape.layers, shape.kv_heads, generator=generator)
    HeadGates(values, window=WINDOW, model=shape).save(folder, config={"model": str(model)})
    return folder


def evaluation(folder: Path) -> EvalConfig:
    """Of RLKV and random masks on five problems; ``output`` is to be replaced."""
    model = save_model(folder / "model")
    return EvalConfig(
        gates=str(save_gates(folder / "gates", model)),
        data=str(save_problems(folder / "test.jsonl")),
        output=str(folder / "never"),
        sparsities=[0.25, 2 / 3],
        random_masks=2,
        reward="tiny_folder:parity",
        max_new_tokens=24,
        slots=8,
        device="cpu",
    )
