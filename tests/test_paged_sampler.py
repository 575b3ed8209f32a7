"""The paged sampler against the slot sampler: float32 completions, whatever the pages go through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_sampler import KV_HEADS, LAYERS, NEVER, RAGGED, WINDOW, Launches, make, make_prompts, random_gates

from rlkv.errors import RLKVError
from rlkv.paged import PagedSampler
from rlkv.sampler import Completion, Sampler, SamplingParams
from rlkv.slots import Prefill
from rlkv.window import Window

PAGE = 16
PROMPTS = make_prompts(RAGGED) + [make_prompts(RAGGED)[8]] * 3 + [make_prompts([32], seed=5)[0]] * 2
PARAMS = SamplingParams(max_new_tokens=45, temperature=0.8, seed=4)


def hard_gates(*shape: int) -> torch.Tensor:
    gates = random_gates(*shape).round()
    gates[..., 0, :] = 0.0  # a layer without full heads
    gates[..., -1, :] = 1.0  # and one without local heads
    return gates


GATES: dict[str, torch.Tensor | None] = {
    "none": None,
    "soft": random_gates(LAYERS, KV_HEADS),
    "mask": hard_gates(LAYERS, KV_HEADS),
    "soft each": random_gates(len(PROMPTS), LAYERS, KV_HEADS),
    "mask each": hard_gates(len(PROMPTS), LAYERS, KV_HEADS),
}


def paged(model: Any, **options: Any) -> PagedSampler:
    """With every page NaN when a call begins, so that nothing but a request's own tokens may ever be read."""
    sampler = PagedSampler(model, WINDOW, **{"slots": 6, "max_length": 130, "page_size": PAGE, **options})
    hold = sampler._cache.hold

    def hold_poison() -> None:
        hold()
        sampler._cache.keys.fill_(torch.nan)
        sampler._cache.values.fill_(torch.nan)

    sampler._cache.hold = hold_poison  # type: ignore[method-assign]
    return sampler


def check_same(found: list[Completion], expected: list[Completion]) -> None:
    assert [(c.index, c.tokens, c.finish) for c in found] == [(c.index, c.tokens, c.finish) for c in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=2e-5, rtol=0
        )


def row_bytes(sampler: PagedSampler) -> int:
    return sampler._cache.keys[0].nbytes * 2


@pytest.mark.parametrize("prefill", ["local", "full"])
@pytest.mark.parametrize("name", GATES)
def test_completions_are_the_slot_samplers(name: str, prefill: Prefill) -> None:
    model = make()
    slots = Sampler(model, WINDOW, slots=4, max_length=130, prefill=prefill)
    expected = slots.generate(PROMPTS, PARAMS, GATES[name])
    sampler = paged(model, prefill=prefill)
    check_same(sampler.generate(PROMPTS, PARAMS, GATES[name]), expected)
    assert sampler.pool.used == 0 and sampler.pool.most_used > 0
    assert len({len(completion.tokens) for completion in expected}) > 3  # slots were refilled at odd times


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_other_architectures(kind: str) -> None:
    model = make(kind)
    expected = Sampler(model, WINDOW, slots=4, max_length=130).generate(PROMPTS, PARAMS, GATES["soft"])
    check_same(paged(model).generate(PROMPTS, PARAMS, GATES["soft"]), expected)


def test_a_model_outside_the_family_goes_through_its_own_forward() -> None:
    model = make()
    expected = Sampler(model, WINDOW, slots=4, max_length=130).generate(PROMPTS, PARAMS, GATES["mask"])
    sampler = paged(model)
    sampler._family = None
    check_same(sampler.generate(PROMPTS, PARAMS, GATES["mask"]), expected)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_joined_weights_are_the_same_parameters(kind: str) -> None:
    model, prompts = make(kind), PROMPTS[:3]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    expected = Sampler(model, WINDOW, slots=4, max_length=130).generate(prompts, PARAMS)
    sampler = paged(model, join_weights=True)
    check_same(sampler.generate(prompts, PARAMS), expected)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    attention = model.model.layers[1].self_attn
    blocks = {part.weight.untyped_storage().data_ptr() for part in (attention.q_proj, attention.v_proj)}
    assert len(blocks) == 1  # one memory for all three
    with torch.no_grad():
        attention.v_proj.weight.mul_(1.5)  # the trainer's tensor is the sampler's
    changed = Sampler(model, WINDOW, slots=4, max_length=130).generate(prompts, PARAMS)
    check_same(sampler.generate(prompts, PARAMS), changed)
    assert [c.tokens for c in changed] != [c.tokens for c in expected]


def test_released_pages_come_back_for_the_next_call() -> None:
    model = make()
    sampler = paged(model, release=True)
    first = sampler.generate(PROMPTS[:4], PARAMS, GATES["soft"])
    assert sampler._cache.keys is None and sampler._cache.values is None
    check_same(sampler.generate(PROMPTS[:4], PARAMS, GATES["soft"]), first)
    assert sampler._cache.keys is None and sampler.pool.used == 0


@pytest.mark.parametrize("prefill", ["local", "full"])
@pytest.mark.parametrize("name", ["none", "soft", "mask"])
def test_tiny_pools_make_requests_wait_and_come_back(name: str, prefill: Prefill) -> None:
    model = make("llama")
    params = SamplingParams(max_new_tokens=60, seed=4, stop_ids=NEVER)
    expected = Sampler(model, WINDOW, slots=4, max_length=150, prefill=prefill).generate(
        PROMPTS, params, GATES[name]
    )
    whole = LAYERS * KV_HEADS * -(-150 // PAGE)  # pages of the longest request
    seen = []
    for pages in (whole + 1, whole + 30):
        sampler = paged(model, max_length=150, prefill=prefill)
        small = paged(model, max_length=150, prefill=prefill, kv_bytes=pages * row_bytes(sampler))
        small._every, small._refill = 4, 2
        check_same(small.generate(PROMPTS, params, GATES[name]), expected)
        seen.append(small.preemptions)
        assert small.pool.used == 0 and small.pool.most_used < pages
    assert sum(seen) > 0


def test_a_pool_too_small_for_one_request_is_an_error() -> None:
    model = make()
    with pytest.raises(RLKVError, match="kv_bytes"):
        paged(model, kv_bytes=100)
    sampler = paged(model)
    tiny = paged(model, kv_bytes=60 * row_bytes(sampler))
    with pytest.raises(RLKVError, match=r"59 of 16 tokens.*prompt 2"):
        tiny.generate(PROMPTS, PARAMS)
    few = tiny.generate(PROMPTS[:2], SamplingParams(max_new_tokens=5))
    assert len(few) == 2 and tiny.pool.used == 0


def test_local_heads_hold_their_window_alone_and_groups_share_their_prompt() -> None:
    model, prompt = make(), make_prompts([64])[0]
    params = SamplingParams(max_new_tokens=1, stop_ids=NEVER)
    rows = LAYERS * KV_HEADS
    used = {}
    for name, gates in (("full", None), ("local", torch.zeros(LAYERS, KV_HEADS))):
        for count in (1, 5):
            sampler = paged(model)
            sampler.generate([prompt] * count, params, gates)
            used[name, count] = sampler.pool.most_used
    assert used["full", 1] == rows * 4 and used["local", 1] == rows  # 64 tokens; a window of 12
    assert used["full", 5] == rows * 4 and used["local", 5] == 5 * rows
    sampler = paged(model)
    sampler.generate([prompt] * 5, SamplingParams(max_new_tokens=2, stop_ids=NEVER))
    assert sampler.pool.most_used == rows * (4 + 5)  # each sample's own page begins with its second token


def test_equal_prompts_are_processed_once() -> None:
    model = make()
    calls: list[tuple[int, int]] = []
    model.model.layers[0].register_forward_hook(lambda _, __, output: calls.append(output.shape[:2]))
    sampler = paged(model, slots=12)
    calls.clear()
    sampler.generate(
        [prompt for prompt in make_prompts([30, 1, 18]) for _ in range(4)], PARAMS, GATES["soft"]
    )
    assert [call for call in calls if call[1] > 1] == [(3, 30)]


@pytest.mark.parametrize("name", ["soft", "mask each"])
def test_the_gpu_schedule_gives_the_same_completions(name: str) -> None:
    model = make()
    expected = Sampler(model, WINDOW, slots=4, max_length=130).generate(PROMPTS, PARAMS, GATES[name])
    sampler, launches = paged(model, slots=8), Launches()
    sampler._graphs = launches  # type: ignore[assignment]
    sampler._every, sampler._refill = 8, 3
    check_same(sampler.generate(PROMPTS, PARAMS, GATES[name]), expected)
    assert {key[0] for key in launches.keys} <= {1, 2, 4, 8}
    few = sampler.generate(PROMPTS[:1], PARAMS, GATES[name] if name == "soft" else GATES["mask each"][:1])  # type: ignore[index]
    assert few[0].tokens == expected[0].tokens


def test_another_window_and_a_broken_callback() -> None:
    model = make()
    window = Window(2, 40)
    expected = Sampler(model, window, slots=4, max_length=130).generate(PROMPTS, PARAMS, GATES["mask"])
    sampler = paged(model)

    def fail(_: Completion) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.generate(PROMPTS, PARAMS, GATES["mask"], on_finish=fail)
    assert sampler.pool.used == 0
    sampler.window = window
    check_same(sampler.generate(PROMPTS, PARAMS, GATES["mask"]), expected)


def test_training_mode_and_bad_settings() -> None:
    model = make("llama").train()
    sampler = PagedSampler(model, WINDOW, slots=2, max_length=60, page_size=16)
    assert len(sampler.generate(make_prompts([20, 4]), PARAMS)) == 2 and model.training
    assert sampler.generate([], PARAMS) == []
    for options in ({"page_size": 24}, {"slots": 0}, {"prefill": "some"}, {"cuda_graphs": True}):
        with pytest.raises(RLKVError):
            paged(model, **options)
