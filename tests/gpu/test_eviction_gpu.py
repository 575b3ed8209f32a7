"""Token-dropping methods on a GPU: each step against the slow float64 judge; the full cache at sparsity 0."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))
from eviction_judge import run
from tiny_models import VOCABULARY, tiny

from rlkv.sampler import Sampler, SamplingParams
from rlkv.window import Window
from rlkv_eval.methods.base import Context, get_method

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
METHODS = ["h2o", "rkv", "streaming", "random_eviction"]
WINDOW = Window(3, 9)


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def make_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 5, 60, 2, 11, 12, 13, 33, 70, 3]
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("method", METHODS)
def test_every_step_is_the_judges(method: str) -> None:
    model = tiny("qwen3").cuda()
    trial = run(model, method, 5 / 9, make_prompts(), window=WINDOW, slots=4, new_tokens=40)
    for request in range(len(trial.prompts)):
        trial.judged(request)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_sparsity_zero_it_is_the_full_cache(method: str, dtype: torch.dtype) -> None:
    model, prompts = tiny("llama").to("cuda", dtype), make_prompts()
    params = SamplingParams(max_new_tokens=40, temperature=0.0, stop_ids=(7,))
    sampler = Sampler(model, WINDOW, slots=4, max_length=130, prefill="full")
    context = Context(model, None, WINDOW, "full", 4, 130, 0, None, [], Path())
    full = sampler.generate(prompts, params)
    mine = get_method(method).build(context, 0.0).generate(prompts, params)
    same = sum(one.tokens == other.tokens for one, other in zip(mine, full, strict=True))
    assert same == len(prompts) if dtype == torch.float32 else same >= len(prompts) // 2  # bfloat16 has ties
