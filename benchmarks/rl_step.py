"""Everything about one RL step of an 8B model on one GPU, in about 2 min, the most important results first.

    python benchmarks/rl_step.py --gates GATES --json rl_step.json

Tokens against the slot sampler, benchmarks/sampler.py and benchmarks/train_step.py on one model, the
projected hours of the recipe, where a decode step's time goes, and with ``--whole`` one step as it is
(benchmarks/whole_step.py, 3 min more). A stage that fails is reported and the next one begins. ``--tiny``
tries it out, on a CPU too.
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
from kernel_times import kernel_times
from random_llama import random_llama
from whole_step import whole_step

POOL = 53.7  # GB of pages: kv_gib 50 of the recipe


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
    """Updates of the gates, with the memory that the pages had."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return training.measure(
        model, (90, 40, 20) if tiny else training.LENGTHS, 300 if tiny else training.BUDGET
    )


def profile(model: Any, tiny: bool) -> list[dict[str, Any]]:
    """Milliseconds of a decode step with soft gates by kind of kernel, at two sizes."""
    made = sampling.make_sampler(model, sampling.WINDOW, 128, 8192, 0.05 if tiny else 30.0)
    soft = torch.rand(model.config.num_hidden_layers, model.config.num_key_value_heads)
    rows = []
    for count, length in ((4, 32), (2, 64)) if tiny else ((128, 512), (16, 4096)):
        lengths = [length] * count
        wall = 1e3 * sampling.step_seconds(made, lengths, soft)
        steps = 3 * made._every  # two rounds that warm up, and one
        times = kernel_times(lambda lengths=lengths: sampling.step_seconds(made, lengths, soft, rounds=1), 16)
        rows.append({"rows": count, "length": length, "wall": wall,
                     **{kind: took / steps for kind, took in times.items()}})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gates", help="a gates table whose heads the mask follows")
    parser.add_argument("--json")
    parser.add_argument("--static", action="store_true", help="transformers with its static cache too")
    parser.add_argument("--whole", action="store_true", help="one whole step, measured")
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
        results,
        "sampler",
        lambda: sampling.measure(model, arguments.gates, bandwidth, pool, tiny, arguments.static),
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
    if arguments.whole:
        whole = stage(results, "whole step", lambda: whole_step(model, *((0.3, 200) if tiny else ())))
        print(whole)
        write_json(arguments.json, results)


if __name__ == "__main__":
    main()
