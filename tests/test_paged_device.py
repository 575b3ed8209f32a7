"""What CUDA graphs ask of the decode step, checked without a GPU: it runs on meta tensors.

Those have no values and mix with no other device: an operation that waits for a result, whose shape depends
on values, or that brings a tensor of the host's along, raises an error.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch
from test_sampler import KV_HEADS, LAYERS, WINDOW, make

from rlkv.paged import PagedSampler
from rlkv.paged.plain import PlainDecoder
from rlkv.paged.prefill import prefill
from rlkv.paged.state import Run, make_jobs
from rlkv.sampling import SamplingParams

META = torch.device("meta")


class StandIn:
    """In place of the kernels, a check of what they are handed."""

    plan = staticmethod(PlainDecoder().plan)

    def attend(
        self, query: torch.Tensor, keys: Any, values: Any, table: torch.Tensor, *more: Any
    ) -> torch.Tensor:
        assert query.shape[1:] == (8, keys.shape[2]) and table.dtype == torch.int32
        assert table.shape[:2] == (len(query), KV_HEADS) and table.stride(2) == 1
        return torch.empty_like(query)


@pytest.mark.parametrize("own_forward", [True, False])
@pytest.mark.parametrize("mode", ["none", "soft", "mask"])
@pytest.mark.parametrize("prefill_policy", ["local", "full"])
@torch.inference_mode()
def test_nothing_waits_for_the_device(mode: str, own_forward: bool, prefill_policy: Any) -> None:
    model = make("qwen3").to(META)
    sampler = PagedSampler(
        model, WINDOW, slots=8, max_length=130, prefill=prefill_policy, page_size=16, join_weights=True
    )
    sampler._cache.decoder = StandIn()
    if not own_forward:
        sampler._family = None
    gates = None if mode == "none" else torch.empty(1, LAYERS, KV_HEADS, device=META)
    for params in (
        SamplingParams(),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7, top_k=5, top_p=0.9),
    ):
        keys = torch.empty(8, dtype=torch.int64, device=META)
        stop = torch.empty(2, dtype=torch.int64, device=META)
        run = Run(8, params, gates, mode == "mask", keys, stop, deque())
        sampler._step(run, 4)
    prompts = [[3] * 5, [4] * 70, [5] * 90]
    jobs = make_jobs(prompts, torch.zeros(1, LAYERS, KV_HEADS).numpy(), mode == "mask", 9, 130)
    slots = {0: 2, 1: 0, 2: 5}
    table = sampler._tables.table
    found = prefill(model, sampler._cache, table, run, list(jobs), slots, 200)
    assert {index: row.shape for index, row in found.items()} == {index: (64,) for index in slots}
    sampler._begin(run, list(jobs), slots, torch.stack([found[index] for index in range(3)]))
