"""Triton is neither needed to start nor imported before a kernel is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
START = """
import sys
import rlkv
from rlkv.cli import main
main(["--help"])
assert "triton" not in sys.modules
"""
WITHOUT = """
import sys
sys.modules["triton"] = None  # importing it is an error
import rlkv
import rlkv.trainer
from rlkv.cli import main
from rlkv.paged import PagedSampler
from test_sampler import WINDOW, make
for name in rlkv.__all__:
    getattr(rlkv, name)
assert main(["train", "--help"]) == 0
assert not [name for name in sys.modules if name.startswith("rlkv.kernels.")]
PagedSampler(make(), WINDOW, slots=2, max_length=40, page_size=16).generate([[5]])
"""


def run(script: str) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_starting_imports_no_triton() -> None:
    run(START)


def test_sampler_and_trainer_work_without_triton() -> None:
    run(WITHOUT)
