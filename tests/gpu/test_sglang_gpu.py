"""SGLang with a head mask on a GPU, in a process of its own; what is checked is told in sglang_check.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHECK = str(Path(__file__).with_name("sglang_check.py"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("prefill", ["full", "local"])
@pytest.mark.parametrize("backend", ["fa3", "triton"])
def test_served_tokens_are_the_references(prefill: str, backend: str) -> None:
    pytest.importorskip("sglang.srt.plugins", reason="SGLang is not installed")
    run = subprocess.run([sys.executable, CHECK, prefill, backend], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout.strip().splitlines()[-1])
    assert result["same"] > 0.88 and result["shortfall_in_std"] < 0.4, result
