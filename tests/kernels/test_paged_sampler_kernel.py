"""The paged sampler on the decode and elementwise kernels: the slot sampler's tokens, in float32."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_kit import DEVICE

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1]))
from test_paged_sampler import GATES, PARAMS, PROMPTS, WINDOW, check_same, make, paged  # noqa: E402
from test_sampler import KINDS, NEVER, make_prompts  # noqa: E402

from rlkv.attention import Mixed  # noqa: E402
from rlkv.logprobs import response_logprobs  # noqa: E402
from rlkv.sampler import Sampler, SamplingParams  # noqa: E402
from rlkv.window import Window  # noqa: E402

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


@pytest.mark.parametrize(
    ("name", "window"),
    [("soft", Window(3, 9)), ("mask", Window(0, 1)), ("soft", Window(0, 16)), ("mask", Window(5, 1))],
)
def test_logprobs_are_the_trainers(name: str, window: Window) -> None:
    model, prompts, gates = make("qwen3").to(DEVICE), make_prompts([5, 27]), GATES[name]
    assert gates is not None
    sampler = paged(model)
    sampler.window = window
    assert sampler._cache.on_kernels
    params = SamplingParams(max_new_tokens=5, temperature=0.7, stop_ids=NEVER)
    completions = sampler.generate(prompts, params, gates)
    rows = [(prompt, done.tokens) for prompt, done in zip(prompts, completions, strict=True)]
    with torch.no_grad():
        wanted = response_logprobs(model, rows, 0.7, Mixed(gates.to(DEVICE), window)).cpu()
    found = torch.tensor([logprob for done in completions for logprob in done.logprobs])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("dim", "max_length", "triton"), [(80, 130, True), (256, 130, True), (16, 40, True), (16, 130, False)]
)
def test_without_the_kernels_the_sampler_is_plain_pytorchs(
    monkeypatch: pytest.MonkeyPatch, dim: int, max_length: int, triton: bool
) -> None:
    """Where they have no tiles for a head dim, where a table holds less than a block, where Triton lacks."""
    if not triton:
        for module in ("family", "sampling"):
            monkeypatch.setattr(f"rlkv.{module}.available", lambda: False)
    kinds: Any = KINDS["qwen3"]
    monkeypatch.setitem(KINDS, "other", (*kinds[:2], {"head_dim": dim}))
    model, prompts = make("other").to(DEVICE), make_prompts([5, 20, 20])
    for name in ("soft", "mask"):
        expected = Sampler(model, WINDOW, slots=4, max_length=max_length).generate(
            prompts, SHORT, GATES[name]
        )
        sampler = paged(model, max_length=max_length)
        assert not sampler._cache.on_kernels and sampler._graphs is None
        for _ in range(3):  # on CUDA, the second step of a kind would be captured
            check_same(sampler.generate(prompts, SHORT, GATES[name]), expected)


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
