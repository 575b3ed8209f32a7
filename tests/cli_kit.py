"""What the tests of the command line share: a folder of inputs, and the words of working commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_folder import save_gates, save_model, save_problems

from rlkv.cli import main
from rlkv.gates import HeadGates


def save_home(folder: Path) -> Path:
    """A model, gates and problems, and some that don't fit them."""
    model = save_model(folder / "model")
    save_gates(folder / "gates", model)
    save_problems(folder / "test.jsonl")
    save_problems(folder / "dev.jsonl", start=50)
    (folder / "empty.jsonl").write_text("")
    rows = [{"prompt": "ab=12;" * 60, "answer": "1"}]
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_model(folder / "other", num_key_value_heads=2)
    save_model(folder / "sliding", kind="mistral", sliding_window=64)
    HeadGates(torch.rand(3, 2)).save(folder / "narrow")
    (folder / "nan.tsv").write_text("1\t1\t1\n1\tnan\t1\n1\t1\t1\n")
    return folder


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command that exits with 2 says: one line, after whatever loading bars there were."""
    capsys.readouterr()
    assert main(words) == 2
    *bars, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert not any("error" in bar.lower() for bar in bars)
    return error


EVAL = (
    "eval",
    "gates={home}/gates",
    "data={home}/test.jsonl",
    "output={out}",
    "max_new_tokens=8",
    "device=cpu",
)
GENERATE = ("generate", "gates={home}/gates", "max_new_tokens=8", "device=cpu")
ASK = ("model={home}/model", "data={home}/test.jsonl", "output={out}", "dtype=float32", "device=cpu")
ASK += ("max_prompt_tokens=99", "max_new_tokens=50", "reward=exact", "prompt_column=prompt")
TRAIN, COLLECT = ("train", *ASK), ("collect", *ASK)
