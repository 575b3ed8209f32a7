"""SGLang with a head mask on a GPU, in processes of its own: see sglang_check.py and sglang_pocket.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def result(script: str, *words: str) -> dict[str, Any]:
    pytest.importorskip("sglang.srt.plugins", reason="SGLang is not installed")
    run = subprocess.run([sys.executable, str(FOLDER / script), *words], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert re.search(r"#retracted_reqs: [1-9]", run.stdout + run.stderr), "nothing was retracted"
    found: dict[str, Any] = json.loads([line for line in run.stdout.splitlines() if line.startswith("{")][-1])
    print(found)
    return found


@pytest.mark.parametrize("prefill", ["full", "local"])
@pytest.mark.parametrize("backend", ["fa3", "triton"])
def test_served_tokens_are_the_references(prefill: str, backend: str) -> None:
    found = result("sglang_check.py", prefill, backend)
    assert found["same"] > 0.88 and found["shortfall_in_std"] < 0.4, found


@pytest.mark.parametrize("prefill", ["full", "local"])
def test_pocket_tokens_are_the_samplers(prefill: str) -> None:
    found = result("sglang_pocket.py", prefill, "200")
    assert found["same"] >= 190 and all(gap < 1e-3 for gap in found["gaps"]), found
    assert found["tokens_left_in_pool"] == 0
