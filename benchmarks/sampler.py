"""The paged sampler on a random Llama-8B: tokens a second, beside the memory's limit and other engines.

    python benchmarks/sampler.py --gates GATES --json sampler.json

Correctness first: float32 tokens are the slot sampler's, bf16 log-probabilities are near the trainer's. Then
(1) 128 requests of 128 + 512 tokens with soft gates and with a mask (at the training window, which hides next
to nothing at these lengths, and at the deployed one), and 256 requests with full heads, which SGLang 0.5.17
does at 17,088 tokens/s on an H100; then 32 requests of 128 + 128 tokens beside transformers' generate with
its dynamic cache and (compiled, a minute more: --static) its static one; (2) seconds of a step at given
lengths, without a prompt pass; (3) steps at equal memory: requests of mean length 4096 that fit a pool of
36 GB (whole answers at equal memory: equal_memory.py). "limit" is the time to read weights, keys and values
once a step at the copy bandwidth measured in the same run; prompts are left out of it, not of tokens/s.
"graph rows" are those that a step computes: its graph's, of which there are 16 sizes. As a
stage of rl_step.py it takes 53 s.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from gpu_memory import MemoryWatch
from gpu_timing import card, copy_bandwidth, print_table, write_json
from random_llama import random_llama, weight_bytes
from sampler_checks import check_tokens, trainer_gap

from rlkv.attention import NAME
from rlkv.errors import RLKVError
from rlkv.gates import HeadGates
from rlkv.paged import PagedSampler
from rlkv.paged.state import Live
from rlkv.sampler import SamplingParams
from rlkv.window import Window

SGLANG = 17_088  # tokens/s, 256 requests x (128 + 512), SGLang 0.5.17, one H100, measured apart
WINDOW, DEPLOYED = Window(128, 256), Window(16, 64)
Gates = torch.Tensor | None


def throughput(sampler: PagedSampler, requests: int, new: int, gates: Gates) -> float:
    """Tokens a second of whole answers, prompt passes included; the first call captures its graphs."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 20000, (requests, 128), generator=generator).tolist()
    vocabulary = sampler.model.config.vocab_size
    sampler.generate(prompts, SamplingParams(max_new_tokens=24, stop_ids=(vocabulary,)), gates)
    sampler.generate(prompts, SamplingParams(max_new_tokens=new, stop_ids=(vocabulary,)), gates)
    return sampler.tokens_per_second


def transformers_throughput(model: Any, requests: int, new: int, cache: str) -> float:
    """Tokens a second of transformers' generate with its own attention; ``cache`` is dynamic or static."""
    ids = torch.randint(0, 20000, (requests, 128), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids), "do_sample": True, "top_k": 0, "pad_token_id": 0,
        "cache_implementation": None if cache == "dynamic" else cache,
    }  # fmt: skip
    model.set_attn_implementation("sdpa")
    try:
        model.generate(ids, max_new_tokens=8 if cache == "dynamic" else new, **options)  # compiles
        if ids.is_cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        found = model.generate(ids, max_new_tokens=new, **options)
        if ids.is_cuda:
            torch.cuda.synchronize()
        return (found.shape[1] - ids.shape[1]) * requests / (time.perf_counter() - began)
    finally:
        model.set_attn_implementation(NAME)


@torch.inference_mode()
def step_seconds(sampler: PagedSampler, lengths: list[int], gates: Gates, rounds: int = 2) -> float:
    """Seconds of one decode step of requests that hold so many tokens, whatever is in their pages."""
    stop = (sampler.model.config.vocab_size,)
    params = SamplingParams(max_new_tokens=sampler.max_length - 1, stop_ids=stop)
    run = sampler._start([[1]] * len(lengths), params, gates)
    sampler._hold()
    for slot, length in enumerate(lengths):
        job = run.waiting.popleft()
        run.live[slot] = Live(job, length)
        sampler._tables.open(slot, job.rows)
    where = torch.arange(len(lengths), device=sampler._device)
    at = torch.tensor(lengths, device=sampler._device)
    own = run.gates_of(range(len(lengths)))
    start = torch.stack([torch.ones_like(at), at, at + sampler.max_length, run.keys])
    sampler._state.admit(where, start, 1.0 if own is None else own)
    sampler._state.full[where] = True if own is None or run.soft else own == 1
    try:
        for _ in range(2):
            sampler._decode(run)
        _wait(sampler)
        began = time.perf_counter()
        for _ in range(rounds):
            sampler._decode(run)
        _wait(sampler)
        if len(run.live) < len(lengths):
            raise RLKVError(f"step_seconds: the pool can't hold {len(lengths)} requests")
        return (time.perf_counter() - began) / rounds / sampler._every
    finally:
        sampler._vacate(run, list(run.live))


def _wait(sampler: PagedSampler) -> None:
    if sampler._device.type == "cuda":
        torch.cuda.synchronize()


def held_bytes(sampler: PagedSampler, lengths: list[int], gates: Gates) -> int:
    """Bytes of keys and values that a step must read."""
    shape = sampler._shape
    rows = shape.layers * shape.kv_heads
    full = rows
    if gates is not None and bool(((gates == 0) | (gates == 1)).all()):
        full = int(gates.sum())
    tokens = sum(length * full + sampler.window.held(length) * (rows - full) for length in lengths)
    return tokens * shape.head_dim * 2 * sampler._cache.keys.element_size()


def run_bytes(model: Any, sampler: PagedSampler, requests: int, new: int, gates: Gates) -> int:
    """Bytes that the steps of ``throughput`` must read: weights, and what each step's own lengths hold."""
    steps = range(129, 128 + new)  # the first token is the prompt pass's
    held = sum(held_bytes(sampler, [length], gates) for length in steps)
    return len(steps) * weight_bytes(model) + requests * held


def spread(count: int, mean: int) -> list[int]:
    """Lengths evenly spread from a tenth of the mean to 1.9 times it."""
    return [int(mean * (0.1 + 1.8 * (index + 0.5) / count)) for index in range(count)]


def mask_gates(path: str | None, layers: int, heads: int) -> torch.Tensor:
    """Half of the heads full, as the published gates rank them, or at random."""
    if path:
        return HeadGates.load(path).mask(0.5).full.float()
    order = torch.rand(layers * heads, generator=torch.Generator().manual_seed(0)).argsort()
    return (order < layers * heads // 2).float().view(layers, heads)


def make_sampler(model: Any, window: Window, slots: int, max_length: int, gigabytes: float) -> PagedSampler:
    return PagedSampler(model, window, slots=slots, max_length=max_length, kv_bytes=int(gigabytes * 1e9))


def measure(
    model: Any,
    gates_path: str | None,
    bandwidth: float,
    pool: float = 36.0,
    tiny: bool = False,
    static: bool = False,
) -> dict[str, Any]:
    """Runs of whole answers, steps, and equal memory; see above."""
    config = model.config
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    soft = torch.rand(layers, heads, generator=torch.Generator().manual_seed(1)).clamp(0.01, 0.99)
    mask = mask_gates(None if tiny else gates_path, layers, heads)
    new, scale = (24, 16) if tiny else (512, 1)
    sampler = make_sampler(model, WINDOW, 512 // scale, 8192 // scale, pool)
    for states in (sampler._cache.keys, sampler._cache.values):
        states.normal_()
    watch = MemoryWatch()
    result: dict[str, Any] = {"trainer": trainer_gap(model, sampler, soft)}
    runs: list[dict[str, Any]] = []
    for name, count, gates, window in (
        ("soft", 128, soft, WINDOW), ("mask 0.5", 128, mask, WINDOW), ("mask 0.5", 128, mask, DEPLOYED),
        ("full", 256, None, WINDOW),
    ):  # fmt: skip
        sampler.window, count = window, count // scale
        limit = count * new * bandwidth / run_bytes(model, sampler, count, new, gates)
        speed = throughput(sampler, count, new, gates)
        runs.append({"run": name, "window": str(window), "requests": count, "tokens/s": speed,
                     "limit": limit, "% limit": 100 * speed / limit})  # fmt: skip
        print(runs[-1], flush=True)
    sampler.window = WINDOW
    peers = {"ours": throughput(sampler, 32 // scale, new // 4, None)}
    for cache in ("dynamic", "static") if static else ("dynamic",):
        peers[f"transformers, {cache} cache"] = transformers_throughput(model, 32 // scale, new // 4, cache)
    print("32 requests of 128 + 128 tokens, full heads, tokens/s:", peers, flush=True)
    steps: list[dict[str, Any]] = []

    def step(name: str, count: int, mean: int, gates: Gates) -> dict[str, Any]:
        lengths = spread(count, mean)
        seconds = step_seconds(sampler, lengths, gates)
        limit = (weight_bytes(model) + held_bytes(sampler, lengths, gates)) / bandwidth
        steps.append({"step": name, "rows": count, "graph rows": sampler._bucket(count), "mean length": mean,
                      "window": str(sampler.window), "ms": 1e3 * seconds, "limit ms": 1e3 * limit,
                      "tokens/s": count / seconds, "tokens": sum(lengths)})  # fmt: skip
        print(steps[-1], flush=True)
        return steps[-1]

    for count, mean in ((128, 512), (128, 2048), (64, 4096), (16, 4096), (4, 4096)):
        step("soft", max(count // scale, 1), mean // scale, soft)
    sampler.window = DEPLOYED
    step("mask 0.5", 128 // scale, 512 // scale, mask)
    step("full", 128 // scale, 512 // scale, None)
    token = held_bytes(sampler, [1000], None) / 1000
    fits = int(0.97 * pool * 1e9 / (token * 4096 / scale))
    if tiny:
        fits = 4
    both = [step("full", fits, 4096 // scale, None)]
    local = held_bytes(sampler, spread(fits, 4096 // scale), mask) / held_bytes(
        sampler, spread(fits, 4096 // scale), None
    )
    both.append(step("mask 0.5", int(fits / local * 0.97), 4096 // scale, mask))
    gain = both[1]["tokens/s"] / both[0]["tokens/s"]
    print(f"equal memory ({pool} GB): mask over full {gain:.2f}x; bytes allow {1 / local:.2f}x")
    full = next((run["tokens/s"] for run in runs if run["run"] == "full"), float("nan"))
    print(f"256 requests, full heads, against SGLang's {SGLANG} tokens/s: {full / SGLANG:.2f}x")
    result |= {"runs": runs, "32 requests, tokens/s": peers, "steps": steps, "memory": watch.figures()}
    return {**result, "equal_memory_gain": gain, "bytes_allow": 1 / local,
            "over_sglang": full / SGLANG}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gates", help="a gates table whose heads the mask follows")
    parser.add_argument("--json")
    parser.add_argument("--static", action="store_true", help="transformers with its static cache too")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU too: to try this out")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checked = check_tokens(device)
    model = random_llama(device, arguments.tiny)
    bandwidth = copy_bandwidth() if device == "cuda" else 1e10
    pool, tiny = 0.05 if arguments.tiny else 36.0, arguments.tiny
    result = measure(model, arguments.gates, bandwidth, pool, tiny, arguments.static)
    print_table(result["runs"])
    print_table(result["steps"])
    if device == "cuda":
        result |= card()
    write_json(arguments.json, {"check": checked, **result, "copy_bandwidth": bandwidth})


if __name__ == "__main__":
    main()
