"""Everything about one RL step of an 8B model on one GPU, in about 110 s, the most important results first.

    python benchmarks/rl_step.py --gates GATES --json rl_step.json

Tokens against the slot sampler, benchmarks/sampler.py and benchmarks/train_step.py on one model, memory while
the pages stay allocated, the projected hours of the recipe, and where a decode step's time goes. A stage that
fails is reported and the next one begins. ``--tiny`` tries it out, on a CPU too.
"""

from __future__ import annotations

import argparse
import gc
import time
import traceback
from collections.abc import Callable
from typing import Any

import sampler as sampling
import torch
import train_step as training
from gpu_timing import card, copy_bandwidth, print_table, write_json
from random_llama import random_llama

POOL = 42.9  # GB of pages: kv_gib 40 of the recipe


def stage(results: dict[str, Any], name: str, work: Callable[[], Any]) -> Any:
    """Run it, note its result and its seconds."""
    began = time.perf_counter()
    try:
        results[name] = work()
    except Exception:
        traceback.print_exc()
        results[name] = None
    print(f"--- {name}: {time.perf_counter() - began:.1f} s", flush=True)
    return results[name]


def train(model: Any, tiny: bool) -> dict[str, Any]:
    """Updates of the gates beside an allocation of the pages' size."""
    gc.collect()
    pages = None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        pages = torch.empty(int(POOL * 1e9), dtype=torch.uint8, device="cuda")
    result = training.measure(model, (90, 40, 20) if tiny else training.LENGTHS, 300 if tiny else 7680)
    del pages
    return result


def profile(model: Any, tiny: bool) -> list[dict[str, Any]]:
    """The kernels of eight decode steps with soft gates."""
    made = sampling.make_sampler(model, sampling.WINDOW, 128, 4096, 0.05 if tiny else 30.0)
    soft = torch.rand(model.config.num_hidden_layers, model.config.num_key_value_heads)
    lengths = [32] * 4 if tiny else [384] * 128
    sampling.step_seconds(made, lengths, soft)
    with torch.profiler.profile() as found:
        sampling.step_seconds(made, lengths, soft, rounds=1)
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, key))[:25]
    return [
        {"ms": getattr(event, key) / 1e3, "calls": event.count, "kernel": event.key[:90]} for event in events
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gates", help="a gates table whose heads the mask follows")
    parser.add_argument("--json")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    tiny, device = arguments.tiny, "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = card() if device == "cuda" else {}
    stage(results, "check", lambda: sampling.check_tokens(device))
    model = random_llama(device, tiny)
    bandwidth = copy_bandwidth() if device == "cuda" else 1e10
    results["copy_bandwidth"] = bandwidth
    pool = 0.05 if tiny else POOL
    sampled = stage(
        results, "sampler", lambda: sampling.measure(model, arguments.gates, bandwidth, pool, tiny)
    )
    write_json(arguments.json, results)
    trained = stage(results, "train", lambda: train(model, tiny))
    if sampled and trained:
        fit, speed = training.fit_steps(sampled["steps"]), trained["updates"][0]["tokens/s"]
        stage(results, "projection", lambda: training.project(fit, speed, POOL))
    write_json(arguments.json, results)
    found = stage(results, "profile", lambda: profile(model, tiny))
    if found:
        print_table(found)
    write_json(arguments.json, results)


if __name__ == "__main__":
    main()
