"""Plans against HeadMask's own byte counts, and budgets that are never exceeded."""

from __future__ import annotations

import pytest
import torch

from rlkv.errors import RLKVError
from rlkv.mask import HeadMask
from rlkv.serving.plan import Plan
from rlkv.serving.report import describe, describe_budget, describe_capacity
from rlkv.support import ModelShape
from rlkv.window import Window

SHAPE = ModelShape(layers=6, query_heads=16, kv_heads=8, head_dim=32, context_length=4096)


def make(sparsity: float, tp: int = 1, shape: ModelShape = SHAPE, seed: int = 0) -> Plan:
    mask = HeadMask.random(shape.layers, shape.kv_heads, sparsity, seed, tp=tp, model=shape)
    return Plan(mask, shape, Window(4, 16), tp=tp)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_bytes_of_all_ranks_are_the_masks(sparsity: float, tp: int) -> None:
    plan = make(sparsity, tp)
    for length in (20, 21, 500):  # from the window's size on, a ring is full
        assert plan.request_bytes(length) * tp == plan.mask.kv_bytes(length, window=plan.window)
    assert plan.stock_token_bytes * tp == plan.mask.full_bytes(1)
    assert [tp * full for full in plan.full_heads] == plan.mask.per_layer()


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_rank_has_its_full_heads_first(tp: int) -> None:
    plan = make(0.5, tp)
    for layer, order in enumerate(plan.order):
        assert sorted(order.tolist()) == list(range(8))
        kept = plan.mask.full[layer][order].reshape(tp, -1)
        full = plan.full_heads[layer]
        assert kept[:, :full].all() and not kept[:, full:].any()


def test_order_is_untouched_without_local_heads() -> None:
    plan = make(0.0)
    assert not plan.compresses
    assert torch.equal(plan.order, torch.arange(8).expand(6, 8))


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("requests", [1, 7, 100])
def test_capacity_fills_the_budget_and_never_exceeds_it(sparsity: float, requests: int) -> None:
    plan = make(sparsity)
    for budget in range(20_000_000, 20_100_000, 9_973):
        capacity = plan.capacity(budget, requests, staging=64)
        assert capacity.total_bytes <= budget
        rings = (requests + 1) * plan.window.size * plan.local_token_bytes
        assert capacity.ring_bytes == rings and capacity.full_bytes <= budget - rings
        if plan.full_token_bytes:
            assert budget - capacity.total_bytes < plan.full_token_bytes


def test_requests_for_is_the_most_that_fit() -> None:
    plan = make(0.5)
    budget, length = 50_000_000, 1000
    most = plan.requests_for(budget, length)
    assert plan.capacity(budget, most).tokens >= most * length
    assert plan.capacity(budget, most + 1).tokens < (most + 1) * length


def test_gain_is_the_papers_formula() -> None:
    plan = make(0.5)
    s, window, length = plan.mask.sparsity, plan.window.size, 3000
    assert plan.gain(length) == pytest.approx(1 / ((1 - s) + s * window / length))


def test_too_small_a_budget_says_what_takes_the_memory() -> None:
    with pytest.raises(RLKVError, match="too few for 1000 requests"):
        make(0.5).capacity(1_000_000, 1000)


def test_ranks_that_cannot_be_equal_are_refused() -> None:
    full = torch.ones(6, 8, dtype=torch.bool)
    full[3, 5] = False
    with pytest.raises(RLKVError, match="layer 3 keeps 7 full heads, which tp=2"):
        Plan(HeadMask(full), SHAPE, Window(4, 16), tp=2)
    with pytest.raises(RLKVError, match="tp=3"):
        make(0.0, tp=1) and Plan(HeadMask(full), SHAPE, Window(4, 16), tp=3)
    with pytest.raises(RLKVError, match="prefill"):
        Plan(HeadMask(full), SHAPE, Window(4, 16), prefill="some")  # type: ignore[arg-type]


def test_report_names_heads_bytes_and_gain() -> None:
    plan = make(0.5)
    text = describe(plan)
    assert "24 of 48 KV heads full" in text and "1.99x" in text and "4+16" in text
    assert "7 requests" in describe_capacity(plan, plan.capacity(50_000_000, 7))


def test_expected_requests_leave_room_for_prompts_in_chunks() -> None:
    plan = make(0.5)
    assert plan.staging() == 4096 and plan.staging(1000) == 1000  # the context at most
    assert make(0.0).staging() == 0 and Plan(plan.mask, SHAPE, plan.window, prefill="local").staging() == 0
    budget = 100_000_000
    line = describe_budget(plan, budget, plan.staging(), (2048,))
    fitting = plan.requests_for(budget, 2048, 4096)
    assert fitting < plan.requests_for(budget, 2048)
    assert f": {fitting} requests of 2048 tokens" in line and "a prompt of up to 4096 tokens" in line
    assert plan.capacity(budget, fitting, 4096).tokens >= fitting * 2048
