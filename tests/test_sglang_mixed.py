"""Soft gates in SGLang's CPU engine: the sampler's greedy tokens, before and after gates change in place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path
from typing import Literal

import pytest
import torch

ROOT = Path(__file__).parent.parent
NEW = 80


@pytest.mark.skipif(not list(distributions(name="sglang")), reason="SGLang is not installed")
@pytest.mark.parametrize("prefill", ["local", "full"])
def test_tokens_are_the_samplers(prefill: str) -> None:
    paths = [
        str(ROOT / "tests/sglang_stubs"),
        str(ROOT),
        str(ROOT / "sglang"),
        os.environ.get("PYTHONPATH", ""),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "SGLANG_USE_CPU_ENGINE": "1"}
    run = subprocess.run(
        [sys.executable, __file__, prefill], env=environment, capture_output=True, text=True, timeout=500
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("[")]
    assert lines, run.stderr[-3000:]
    assert json.loads(lines[-1]) == [8, 8, 8]


def main(prefill: str) -> list[int]:
    """How many of 8 answers are equal: with the gates of the start, with all ones, with others."""
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
    local: Literal["full", "local"] = "local" if prefill == "local" else "full"
    sampler = Sampler(model, pocket.WINDOW, slots=8, max_length=1000, prefill=local)
    greedy = SamplingParams(max_new_tokens=NEW, temperature=0)
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
            log_level="error",
        )
        equal = []
        for index, gates in enumerate(sets):
            if index:
                engine.update_weights_from_tensor([("rlkv.gates", gates)])
            sampling = {"temperature": 0, "max_new_tokens": NEW}
            answers = engine.generate(input_ids=prompts, sampling_params=sampling)
            expected = sampler.generate(prompts, greedy, gates=gates)
            equal.append(sum(a["output_ids"] == b.tokens for a, b in zip(answers, expected, strict=True)))
        engine.shutdown()
    return equal


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])), flush=True)
