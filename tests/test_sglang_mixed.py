"""Soft gates in SGLang's CPU engine: the sampler's greedy tokens, also when gates change in place, while a
request runs, and updates that can't be are refused."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

ROOT = Path(__file__).parent.parent
NEW = 80
MIDWAY = 40  # tokens before gates change, of ten times as many


@pytest.fixture(scope="module", params=["local", "full"])
def found(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """What one engine showed."""
    paths = [
        str(ROOT / "tests/sglang_stubs"),
        str(ROOT),
        str(ROOT / "sglang"),
        os.environ.get("PYTHONPATH", ""),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "SGLANG_USE_CPU_ENGINE": "1"}
    run = subprocess.run(
        [sys.executable, __file__, request.param],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("{")]
    assert lines, run.stderr[-3000:]
    yield json.loads(lines[-1])


pytestmark = pytest.mark.skipif(not list(distributions(name="sglang")), reason="SGLang is not installed")


def test_tokens_are_the_samplers(found: dict[str, Any]) -> None:
    assert found["equal"] == [8, 8, 8]


def test_gates_change_in_the_middle_of_a_request(found: dict[str, Any]) -> None:
    begun, changed, ended = found["midway"]
    assert MIDWAY <= begun <= changed < ended, "old gates' tokens before the change, new gates' after it"


def test_what_does_not_fit_is_refused_and_changes_nothing(found: dict[str, Any]) -> None:
    shape, nan, direct = found["refused"]
    assert not shape[0] and "rlkv.gates must be of shape" in shape[1]
    assert not nan[0] and "rlkv.gates must be finite" in nan[1]
    assert not direct[0] and "load_format direct" in direct[1]
    assert found["after_refusals"] == "the same"


def test_gates_outlive_released_weights(found: dict[str, Any]) -> None:
    assert found["restored"]


def main(prefill: Literal["full", "local"]) -> dict[str, Any]:
    """``equal``: how many of 8 answers are the sampler's, with gates of the start, with ones, with others."""
    from rlkv import pocket
    from rlkv.data import chat_tokens
    from rlkv.gates import HeadGates
    from rlkv.loading import load_shape
    from rlkv.sampler import Sampler, SamplingParams

    shape, draw = load_shape("pocket"), torch.Generator().manual_seed(0)
    sets = [0.4 + 0.6 * torch.rand(shape.layers, shape.kv_heads, generator=draw) for _ in range(2)]
    sets.insert(1, torch.ones(shape.layers, shape.kv_heads))
    model, tokenizer = pocket.load()
    problems = [p for task in list(pocket.TASKS)[:2] for p in pocket.problems(task, "test", 4)]
    prompts = [chat_tokens(tokenizer, problem["prompt"])[0] for problem in problems]
    sampler = Sampler(model, pocket.WINDOW, slots=8, max_length=1000, prefill=prefill)
    greedy = SamplingParams(max_new_tokens=NEW, temperature=0)
    sampling = {"temperature": 0, "max_new_tokens": NEW}
    with tempfile.TemporaryDirectory() as folder:
        HeadGates(sets[0], window=pocket.WINDOW, model=shape).save(folder)
        os.environ |= {"RLKV_GATES": folder, "RLKV_MODE": "mixed", "RLKV_PREFILL": prefill}
        os.environ |= {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "40"}
        import sglang

        engine = sglang.Engine(
            model_path=str(pocket.weights_folder()),
            attention_backend="rlkv",
            device="cpu",
            dtype="float32",
            sampling_backend="pytorch",
            grammar_backend="none",
            mem_fraction_static=0.3,
            max_total_tokens=1200,
            max_running_requests=6,
            chunked_prefill_size=48,
            enable_mixed_chunk=prefill == "full",
            log_level="error",
        )
        equal = []
        for index, gates in enumerate(sets):
            if index:
                engine.update_weights_from_tensor([("rlkv.gates", gates)])
            answers = engine.generate(input_ids=prompts, sampling_params=sampling)
            expected = sampler.generate(prompts, greedy, gates=gates)
            equal.append(sum(a["output_ids"] == b.tokens for a, b in zip(answers, expected, strict=True)))
        found: dict[str, Any] = {"equal": equal, "refused": refusals(engine, sets[2])}
        again = engine.generate(input_ids=prompts, sampling_params=sampling)
        same = [a["output_ids"] for a in again] == [a["output_ids"] for a in answers]
        found["after_refusals"] = "the same" if same else "others"
        new = torch.zeros(shape.layers, shape.kv_heads)
        begun, tokens = engine.loop.run_until_complete(change_midway(engine, prompts[0], new))
        changed = changed_at(model, prompts[0], tokens, (sets[2], new), prefill)
        found["midway"] = (begun, changed, len(tokens))
        engine.shutdown()
        found["restored"] = restored()
    return found


async def change_midway(engine: Any, prompt: list[int], gates: torch.Tensor) -> tuple[int, list[int]]:
    """How many tokens there were when new gates were sent, and all of the request's."""
    from rlkv_sglang import update_gates

    sampling = {"temperature": 0, "max_new_tokens": 10 * MIDWAY, "ignore_eos": True, "stream_interval": 1}
    begun, tokens = 0, []
    async for chunk in await engine.async_generate(input_ids=prompt, sampling_params=sampling, stream=True):
        tokens = chunk["output_ids"]
        if not begun and len(tokens) >= MIDWAY:
            begun = len(tokens)
            await update_gates(engine, gates)
    return begun, tokens


@torch.inference_mode()
def changed_at(
    model: Any, prompt: list[int], tokens: list[int], gates: tuple[torch.Tensor, torch.Tensor], prefill: str
) -> int:
    """The number of tokens written with the first gates if the others are written with the second, or -1."""
    from transformers import DynamicCache

    from rlkv import pocket
    from rlkv.attention import Mixed, enable

    model = copy.deepcopy(model)
    enable(model)

    def next_token(ids: list[int], gates: torch.Tensor | None, cache: DynamicCache) -> int:
        mixed = {} if gates is None else {"rlkv": Mixed(gates, pocket.WINDOW)}
        return int(model(torch.tensor([ids]), past_key_values=cache, **mixed).logits[0, -1].argmax())

    old, new = gates
    cache = DynamicCache()
    token = next_token(prompt, None if prefill == "full" else old, cache)
    for count in range(1, len(tokens)):
        if token != tokens[count - 1]:
            return -1
        rest, branch = tokens[count - 1 :], copy.deepcopy(cache)
        if count >= MIDWAY and all(
            next_token([token], new, branch) == after for token, after in zip(rest, rest[1:], strict=False)
        ):
            return count
        token = next_token([token], old, cache)
    return -1


def refusals(engine: Any, gates: torch.Tensor) -> list[tuple[bool, str]]:
    """Answers to gates of another shape, to NaN beside a weight, and to a way that knows no gates."""
    nan = [
        ("model.norm.weight", torch.zeros(engine.tokenizer_manager.model_config.hidden_size)),
        ("rlkv.gates", gates * torch.nan),
    ]
    return [
        engine.update_weights_from_tensor([("rlkv.gates", torch.ones(3, 3))]),
        engine.update_weights_from_tensor(nan),
        engine.update_weights_from_tensor([("rlkv.gates", gates)], load_format="direct"),
    ]


def restored() -> bool:
    """Whether gates are among what SGLang keeps while it gives the memory of weights away."""
    from rlkv_sglang import hooks
    from rlkv_sglang.settings import Settings
    from sglang.srt.managers.scheduler_components import weight_updater

    from rlkv.loading import load_shape

    settings, model = Settings.read(), torch.nn.Module()
    model.load_weights = list  # type: ignore[assignment]
    serving = hooks.Serving(settings, settings.plan(load_shape("pocket")), chunked=True)
    hooks.initialize_model(lambda config: model, SimpleNamespace(rlkv=serving))
    assert serving.gates is not None
    before = serving.gates.clone()
    kept = weight_updater._export_static_state(model)
    serving.gates.fill_(torch.nan)
    weight_updater._import_static_state(model, kept)
    return torch.equal(serving.gates, before)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])), flush=True)  # type: ignore[arg-type]
