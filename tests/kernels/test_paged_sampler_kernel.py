"""The paged sampler on the decode and elementwise kernels: the slot sampler's tokens, in float32."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_kit import DEVICE

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1]))
from test_paged_sampler import GATES, PARAMS, PROMPTS, WINDOW, check_same, make, paged  # noqa: E402

from rlkv.sampler import Sampler  # noqa: E402

FEW = (
    slice(4, 7) if DEVICE == "cpu" else slice(0, 16)
)  # lengths around the window of 12; the interpreter is slow
SHORT = replace(PARAMS, max_new_tokens=6 if DEVICE == "cpu" else 45)


@pytest.mark.parametrize(
    ("name", "join"), [("none", False), ("soft", True), ("mask", True), ("mask each", False)]
)
def test_completions_are_the_slot_samplers(name: str, join: bool) -> None:
    model = make("qwen3").to(DEVICE)
    gates = GATES[name]
    if gates is not None and gates.ndim == 3:
        gates = gates[FEW]
    expected = Sampler(model, WINDOW, slots=4, max_length=130).generate(PROMPTS[FEW], SHORT, gates)
    sampler = paged(model, join_weights=join)
    check_same(sampler.generate(PROMPTS[FEW], SHORT, gates), expected)
    assert sampler.pool.used == 0


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("name", "release"), [("none", False), ("soft", False), ("mask", False), ("soft", True)]
)
def test_graphs_and_tiny_pools_change_nothing(name: str, release: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = make("qwen3").to(DEVICE)
    expected = paged(model, cuda_graphs=False).generate(PROMPTS, PARAMS, GATES[name])
    size = paged(model)._cache.keys[0].nbytes * 2
    small = paged(model, kv_bytes=12 * 12 * size, release=release)
    others: list[torch.Tensor] = []
    for _ in range(3):  # later runs replay the graphs of those before them
        check_same(small.generate(PROMPTS, PARAMS, GATES[name]), expected)
        assert small.pool.used == 0
        if release:  # where the pages were, so that they come back elsewhere
            others += [torch.full((6 * 12 * size,), 255, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
