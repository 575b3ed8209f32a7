"""The pocket reasoner served in float32 with a head mask, CUDA graphs and all, against our own sampler.

Chunks of 48 tokens, 2,500 tokens of memory, forced retraction, aborts, NaN in freed memory, as in
tests/test_sglang_cpu.py. Float32, so that two tokens are rarely as good as each other: SGLang's norms and
rotations on a GPU know half precision only, so a plugin takes its PyTorch ones, and Triton's products are of
full precision. Where an answer differs, the float32 model says how far apart the two tokens were. On a
machine without a GPU the same runs on SGLang's CPU engine.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from serving_prompts import pocket_prompts  # noqa: E402

from rlkv import pocket  # noqa: E402
from rlkv.loading import load_shape  # noqa: E402
from rlkv.mask import HeadMask  # noqa: E402

CUDA = torch.cuda.is_available()
LONGEST = 300  # new tokens
NATIVE = """
def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = "sglang.srt.layers.utils.multi_platform.MultiPlatformOp.dispatch_forward"
    HookRegistry.register(target, lambda original, op: op.forward_native, HookType.AROUND)
"""


def native_plugin(folder: Path) -> None:
    """A plugin of SGLang that takes the PyTorch variant of every operator that has one."""
    (folder / "native_ops.py").write_text(NATIVE)
    info = folder / "native_ops-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: native-ops\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nnative = native_ops:register\n")
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def start(folder: Path, prefill: str) -> tuple[Any, HeadMask]:
    """The engine and its mask."""
    shape = load_shape("pocket")
    mask = HeadMask.random(shape.layers, shape.kv_heads, 0.5, 5, window=pocket.WINDOW, model=shape)
    mask.save(folder / "mask.json")
    os.environ |= {
        "RLKV_MASK": str(folder / "mask.json"),
        "RLKV_PREFILL": prefill,
        "RLKV_BACKEND": "triton" if CUDA else "torch_native",
        "RLKV_POISON": "true",
        "SGLANG_TEST_RETRACT": "1",
        "SGLANG_TEST_RETRACT_INTERVAL": "50",
        "TRITON_F32_DEFAULT": "ieee",
    }
    native_plugin(folder)
    import sglang

    engine = sglang.Engine(
        model_path=str(pocket.weights_folder()),
        attention_backend="rlkv",
        device="cuda" if CUDA else "cpu",
        skip_tokenizer_init=True,
        dtype="float32",
        sampling_backend="pytorch",
        grammar_backend="none",
        mem_fraction_static=0.9 if CUDA else 0.3,
        chunked_prefill_size=48,
        max_total_tokens=2500,
        max_running_requests=16,
        cuda_graph_bs_decode=[1, 2, 4, 8, 12, 16],
        random_seed=0,
        log_level="info",
    )
    return engine, mask


def serve(engine: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy answers to all prompts, sent at once, while a fifth as many more are aborted."""
    sampling = {"temperature": 0.0, "max_new_tokens": LONGEST}

    async def ask(index: int, **options: Any) -> list[int]:
        answer = await engine.async_generate(input_ids=prompts[index], sampling_params=sampling, **options)
        ids: list[int] = answer["output_ids"]
        return ids

    async def abort(index: int) -> None:
        asked = asyncio.create_task(ask(index, rid=f"abort-{index}"))
        await asyncio.sleep(0.3 + 0.37 * (index % 7))
        engine.tokenizer_manager.abort_request(f"abort-{index}")
        await asyncio.wait([asked])

    async def everything() -> list[list[int]]:
        aborts = [asyncio.create_task(abort(index)) for index in range(0, len(prompts), 5)]
        answers = await asyncio.gather(*(ask(index) for index in range(len(prompts))))
        await asyncio.gather(*aborts)
        return answers

    answers: list[list[int]] = engine.loop.run_until_complete(everything())
    return answers


@torch.inference_mode()
def compare(prompts: list[list[int]], got: list[list[int]], mask: HeadMask, prefill: Any) -> dict[str, Any]:
    """How many answers are our sampler's, and how close the tokens were where one is not."""
    from rlkv.sampler import Sampler, SamplingParams

    model = pocket.load()[0].to("cuda" if CUDA else "cpu")
    assert mask.window is not None
    sampler = Sampler(model, mask.window, slots=64, max_length=1000, prefill=prefill)
    params = SamplingParams(max_new_tokens=LONGEST, temperature=0)
    expected = [answer.tokens for answer in sampler.generate(prompts, params, gates=mask.gates())]
    gaps = [
        gap(model, mask, prefill, prompt, mine, theirs)
        for prompt, mine, theirs in zip(prompts, expected, got, strict=True)
        if mine != theirs
    ]
    return {
        "answers": len(prompts),
        "same": len(prompts) - len(gaps),
        "tokens": sum(map(len, got)),
        "gaps": sorted(gaps),
    }


def gap(
    model: Any,
    mask: HeadMask,
    prefill: Literal["full", "local"],
    prompt: list[int],
    mine: list[int],
    theirs: list[int],
) -> float:
    """By how much the logits of the first two different tokens differ, in standard deviations."""
    from rlkv.cache import HeadwiseCache

    same = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
    if same is None:
        return float("inf")  # one stopped where the other went on
    assert mask.window is not None
    cache = HeadwiseCache(model.config, mask, window=mask.window, prefill=prefill)
    logits = None
    for ids in [prompt, *([token] for token in mine[:same])]:
        logits = model(torch.tensor([ids], device=model.device), past_key_values=cache).logits[0, -1]
    assert logits is not None
    return float((logits[mine[same]] - logits[theirs[same]]).abs() / logits.std())


def main(prefill: Literal["full", "local"], count: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        engine, mask = start(Path(name), prefill)
        prompts = pocket_prompts(int(count))
        got = serve(engine, prompts)
        time.sleep(1)
        loads = engine.loop.run_until_complete(engine.tokenizer_manager.get_loads(include=["core"]))
        engine.shutdown()
        left = sum(load.num_used_tokens for load in loads)
        return {"prefill": prefill, **compare(prompts, got, mask, prefill), "tokens_left_in_pool": left}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
