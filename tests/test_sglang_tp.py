"""The pocket reasoner on two tensor-parallel ranks of SGLang's CPU engine, a core each."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

import pytest
from test_sglang_cpu import compare, running
from test_sglang_cpu import pytestmark as needs_sglang

CORES = sorted(os.sched_getaffinity(0))
pytestmark = [needs_sglang, pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")]


@pytest.mark.parametrize("prefill", ["full", "local"])
def test_tokens_of_two_ranks_are_the_samplers(tmp_path: Path, prefill: Literal["full", "local"]) -> None:
    cores = f"{CORES[0]}|{CORES[1]}"
    options = ("--enable-mixed-chunk",) if prefill == "local" else ()
    with running(tmp_path, prefill, *options, tp=2, SGLANG_CPU_OMP_THREADS_BIND=cores) as server:
        compare(server, 12)
        plans = re.findall(r"TP(\d)\] rlkv: (KV memory .*)", server.log.read_text())
    assert [rank for rank, _ in sorted(plans)] == ["0", "1"]
    assert len({plan for _, plan in plans}) == 1, plans  # one capacity for both
