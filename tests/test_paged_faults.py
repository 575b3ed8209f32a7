"""The paged sampler when something is attached to the model, or breaks off half way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_paged_sampler import PROMPTS, check_same, paged
from test_sampler import NEVER, RAGGED, WINDOW, Launches, make, make_prompts

from rlkv.errors import RLKVError
from rlkv.paged import PagedSampler
from rlkv.sampler import Sampler, SamplingParams
from rlkv.step_graphs import StepGraphs, takes_graphs


def attach(model: Any, what: str) -> None:
    """Something that the model's own forward respects and joined products would miss."""
    layer = model.base_model.layers[1]

    def turned(output: Any) -> Any:
        output.last_hidden_state = -output.last_hidden_state
        return output

    if what == "layer hook":
        layer.register_forward_hook(lambda _, __, output: output * 1.5)
    elif what == "model hook":
        model.base_model.register_forward_hook(lambda _, __, output: turned(output))
    elif what == "model forward":
        whole = model.base_model.forward
        model.base_model.forward = lambda *inputs, **options: turned(whole(*inputs, **options))
    elif what == "hook":
        layer.self_attn.v_proj.register_forward_hook(lambda _, __, output: output * 2)
    elif what == "forward":
        own = layer.mlp.up_proj.forward
        layer.mlp.up_proj.forward = lambda x: own(x) * 2
    else:

        class Adapted(torch.nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return super().forward(x) * 2

        layer.self_attn.v_proj.__class__ = Adapted


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("what", ["layer hook", "hook", "forward", "adapter", "model hook", "model forward"])
def test_what_is_attached_to_a_model_is_respected(what: str, late: bool) -> None:
    """Also when it is attached between two calls, and no longer once it is gone."""
    model, prompts = make(), make_prompts(RAGGED)[5:9]
    params = SamplingParams(max_new_tokens=20, temperature=0.0)
    slots = Sampler(model, WINDOW, slots=4, max_length=100)
    bare = [completion.tokens for completion in slots.generate(prompts, params)]
    if not late:
        attach(model, what)
    sampler = PagedSampler(model, WINDOW, slots=4, max_length=100, join_weights=True)
    if late:
        assert [completion.tokens for completion in sampler.generate(prompts, params)] == bare
        attach(model, what)
    right = [completion.tokens for completion in slots.generate(prompts, params)]
    assert [completion.tokens for completion in sampler.generate(prompts, params)] == right != bare
    if what == "model hook":
        model.base_model._forward_hooks.clear()
        assert [completion.tokens for completion in sampler.generate(prompts, params)] == bare


def test_graphs_are_of_what_is_attached_now() -> None:
    model = make()
    graphs = StepGraphs(model)
    graphs.refresh()
    for change in ("layer hook", "forward", "adapter", "model hook"):
        graphs._graphs["step"] = object()  # type: ignore[assignment]
        graphs.refresh()
        assert graphs._graphs
        attach(model, change)
        graphs.refresh()
        assert not graphs._graphs, change


def test_graphs_are_for_cuda_and_the_kernels() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert takes_graphs(None, cuda) and takes_graphs(True, cuda) and not takes_graphs(False, cuda)
    assert not takes_graphs(None, cuda, kernels=False) and not takes_graphs(None, cpu)
    for device, kernels, words in ((cpu, True, "model on CUDA"), (cuda, False, "Triton kernels")):
        with pytest.raises(RLKVError, match=words):
            takes_graphs(True, device, kernels)


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("error", [MemoryError("none left"), KeyboardInterrupt("the user's")])
@pytest.mark.parametrize(
    ("part", "name", "call"),
    [
        ("_cache", "copy_pages", 1),
        ("_tables", "open", 3),
        ("_tables", "grow", 2),
        ("_tables", "move", 1),
        ("_state", "move", 1),
        ("_state", "leave", 1),
        ("_state", "results", 2),
        ("pool", "take", 5),
        ("pool", "share", 1),
    ],
)
def test_an_error_leaves_no_pages_and_no_half_written_table(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, part: str, name: str, call: int, done: bool
) -> None:
    """The error comes out as it was raised, before or after the named step, and the next call is right."""
    prompts = [*PROMPTS[8:9] * 3, *PROMPTS[1:4]]  # the first three end early, and the others move down
    params = SamplingParams(max_new_tokens=25, seed=4, stop_ids=NEVER)
    sampler = paged(make(), slots=6, max_length=100, release=True)
    sampler._graphs = Launches()  # type: ignore[assignment]
    wanted = sampler.generate(prompts, params)
    kind, calls = type(getattr(sampler, part)), []
    own = getattr(kind, name)

    def break_off(*inputs: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            if done:
                own(*inputs)
            raise error
        return own(*inputs)

    with monkeypatch.context() as patch, pytest.raises(type(error)) as caught:
        patch.setattr(kind, name, break_off)
        sampler.generate(prompts, params)
    assert caught.value is error and caught.value.__context__ is None
    assert sampler._cache.keys is None and not sampler._tables._places
    assert not sampler.pool.used and not sampler.pool.owners.any() and not sampler._tables.held
    assert len(set(sampler.pool._stack.tolist())) == sampler.pool.free
    check_same(sampler.generate(prompts, params), wanted)
    assert not sampler.pool.used
