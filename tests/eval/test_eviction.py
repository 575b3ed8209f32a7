"""The evicting cache and its generator: budgets, bytes, refilled slots, and the full cache at sparsity 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eviction_judge import run
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, tiny

from rlkv.errors import RLKVError
from rlkv.mask import HeadMask
from rlkv.sampler import Sampler, SamplingParams
from rlkv.schedule import Pace
from rlkv.window import Window
from rlkv_eval.methods.base import Context, Method, get_method, token_budget
from rlkv_eval.methods.eviction.plan import Plan

METHODS = ["h2o", "rkv", "streaming", "random_eviction"]
WINDOW = Window(3, 9)
RAGGED = [1, 5, 60, 2, 11, 12, 13, 33, 70, 3]


def make_prompts(lengths: list[int] = RAGGED) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_at_sparsity_zero_it_is_the_full_cache(method: str, dtype: torch.dtype, temperature: float) -> None:
    model: Any = tiny("qwen3")
    model, prompts = model.to(dtype), make_prompts()
    params = SamplingParams(max_new_tokens=20, temperature=temperature, seed=2, stop_ids=(7, 8))
    full = Sampler(model, WINDOW, slots=4, max_length=130, prefill="full").generate(prompts, params)
    context = Context(model, None, WINDOW, "full", 4, 130, 0, None, [], Path())
    finished: list[int] = []
    mine = (
        get_method(method)
        .build(context, 0.0)
        .generate(prompts, params, lambda completion: finished.append(completion.index))
    )
    assert [completion.tokens for completion in mine] == [completion.tokens for completion in full]
    assert [completion.finish for completion in mine] == [completion.finish for completion in full]
    assert {completion.finish for completion in full} == {"stop", "length"}
    assert sorted(finished) == list(range(len(prompts))) != finished


@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_those_of_a_head_mask_and_those_held(method: str) -> None:
    model, sparsity, lengths = tiny("llama"), 5 / 9, [20, 9, 31, 44, 5]
    trial = run(model, method, sparsity, make_prompts(lengths), window=WINDOW, slots=2, new_tokens=60)
    mask = HeadMask.random(3, 3, sparsity, window=WINDOW, model=trial.context.shape)
    for request, by_length in trial.record.held.items():
        for length, held in by_length.items():
            tokens = sum(len(head) for layer in held for head in layer)
            reported = trial.generator.kv_bytes(length)
            early = method == "rkv" and length < lengths[request] + 8  # a turn ends just after the prompt
            cut = method == "rkv" and trial.generator.kv_bytes(length + 1) <= reported  # just now
            assert tokens * 2 * 8 * 4 == reported or ((early or cut) and tokens * 2 * 8 * 4 < reported)
            assert reported <= mask.kv_bytes(length)
            if method != "rkv":
                assert mask.kv_bytes(length) - reported < 9 * 2 * 8 * 4  # less than a token a head


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("slots", [1, 4])
def test_neighbours_and_former_owners_do_not_matter(method: str, slots: int) -> None:
    model, prompts = tiny("qwen2"), make_prompts()
    options: dict[str, Any] = {"window": WINDOW, "new_tokens": 20}
    together = run(model, method, 5 / 9, prompts, slots=slots, **options)
    # a request's random stream is its place among the prompts: keep the places
    again = run(model, method, 5 / 9, prompts + make_prompts([17, 40]), slots=5, **options)
    for one, other in zip(together.completions, again.completions, strict=False):
        assert one.tokens == other.tokens
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_looking_rarely_at_the_device_changes_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: finished rows go on for some steps, slots are refilled several at a time."""
    model, prompts = tiny("qwen3"), make_prompts()
    options: dict[str, Any] = {"window": WINDOW, "new_tokens": 33, "slots": 4, "max_length": 100}
    often = run(model, method, 7 / 9, prompts, **options)
    pace = Pace(5, 32, groups=1, refill=2, prompt_tokens=100, power_of_two_rows=True)
    monkeypatch.setattr(Pace, "on_cpu", classmethod(lambda cls: pace))
    rarely = run(model, method, 7 / 9, prompts, **options)
    for request, (one, other) in enumerate(zip(often.completions, rarely.completions, strict=True)):
        assert one.tokens == other.tokens
        rarely.judged(request)


@pytest.mark.parametrize("method", METHODS)
def test_everything_dropped_but_the_window(method: str) -> None:
    trial = run(tiny("llama"), method, 1.0, make_prompts(), window=WINDOW, slots=4, new_tokens=30)
    for request in range(len(trial.prompts)):
        held, _, _ = trial.judged(request)
        assert max(len(head) for heads in held.values() for layer in heads for head in layer) <= 12


@settings(max_examples=60, deadline=None)
@given(
    sparsity=st.floats(0, 1),
    sink=st.integers(0, 20),
    recent=st.integers(1, 60),
    observed=st.integers(1, 16),
    extra=st.integers(0, 100),
    share=st.floats(0, 0.5),
)
def test_turns_never_exceed_the_budget(
    sparsity: float, sink: int, recent: int, observed: int, extra: int, share: float
) -> None:
    window = Window(sink, recent)
    plan = Plan.in_turns(sparsity, window, 400, buffer=observed + extra, share=share, observed=observed)
    budget = np.array([token_budget(length, sparsity, window) for length in range(401)])
    held, after = plan.held[:401], plan.after_prompt[:401]
    assert (held <= budget).all() and (held[1:] >= 1).all()
    assert (after <= held).all() and (after[1:] >= 1).all()
    assert (np.diff(held) <= 1).all()  # a token takes one cell
    cuts = np.flatnonzero(np.diff(held) < 1)  # after these lengths room is made
    assert (held[cuts] == budget[cuts]).all()  # and only once the budget is full
    for cut in cuts:  # by then enough queries were watching, counted to the last of them
        age = plan.age[cut]
        assert 1 <= age <= observed
        assert list(plan.age[cut - age + 1 : cut + 1]) == list(range(1, age + 1))


def test_what_is_wrong_is_said() -> None:
    context = Context(tiny("llama"), None, WINDOW, "full", 2, 50, 0, None, [], Path())
    for method in METHODS:
        assert isinstance(get_method(method), Method)
        with pytest.raises(RLKVError, match=r"sparsity must be within \[0, 1\]"):
            get_method(method).build(context, 1.5)
        with pytest.raises(RLKVError, match="prompt 1 has 50 tokens"):
            get_method(method).build(context, 0.5).generate([[1], [1] * 50], SamplingParams())
    wrong_settings: list[tuple[str, dict[str, Any]]] = [
        ("h2o", {"recent": 1.0}),
        ("rkv", {"observed": 0}),
        ("rkv", {"buffer": 4}),
        ("rkv", {"pool": 2}),
        ("rkv", {"mix": 2.0}),
        ("streaming", {"sink": -1}),
        ("random_eviction", {"recent": -1}),
    ]
    for name, wrong in wrong_settings:
        with pytest.raises(RLKVError, match=f"{name}: "):
            get_method(name, wrong)
