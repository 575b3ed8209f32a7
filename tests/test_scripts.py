"""Programs beside ``rlkv``: they explain themselves, and bad input ends with one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = ["-m rlkv.pocket.pretrain", "-m rlkv.pocket.check", "scripts/pocket_study.py"]
RECIPES = ["llama-8b-r1", "qwen-7b-r1", "qwen3-4b-thinking"]


def call(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("program", PROGRAMS)
def test_python_programs(program: str) -> None:
    done = call(sys.executable, *program.split(), "n=3", "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: python {program} ")
    _, *settings = done.stdout.split("\n  ")
    heads = [index for index, line in enumerate(settings) if "=" in line.split("[")[0] and line[0] != " "]
    assert len(heads) >= 6 and all(settings[index + 1].startswith("    ") for index in heads)
    done = call(sys.executable, *program.split(), "sedes=3")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: unknown setting 'sedes'") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_say_how_they_are_called(recipe: str) -> None:
    path = f"scripts/train_{recipe}.sh"
    for words in (["--help"], ["a/model", "-h"]):
        done = call("bash", path, *words)
        assert done.returncode == 0 and f"  bash {path} [MODEL] [key=value ...]\n" in done.stdout
    config = (ROOT / f"configs/{recipe}.yaml").read_text()
    model = next(line.split()[1] for line in config.splitlines() if line.startswith("model:"))
    assert f"(default: {model})" in done.stdout
    assert done.stdout.rstrip().endswith("resume=true")  # and not the shell's own lines


def test_all_recipes_are_tested() -> None:
    assert {path.stem for path in (ROOT / "scripts").glob("train_*.sh")} == {
        f"train_{name}" for name in RECIPES
    }
