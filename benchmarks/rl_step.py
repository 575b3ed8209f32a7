"""Everything about one RL step of an 8B model on one GPU, in about 2 min, the most important results first.

    python benchmarks/rl_step.py --gates GATES --json rl_step.json

Tokens against the slot sampler, benchmarks/sampler.py and benchmarks/train_step.py on one model, the
projected hours of the recipe, where a decode step's time goes, and with ``--whole`` one step as it is
(benchmarks/whole_step.py, 3 min more). A check that fails ends it all: nothing is timed after it. A stage
that fails otherwise is noted, and the next one begins; the exit status is 1 in both cases. ``--tiny`` tries
it out, on a CPU too.
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

from rlkv.errors import RLKVError

POOL = 53.7  # GB of pages: kv_gib 50 of the recipe


class Stages:
    """Results by name, written to ``path`` after every stage."""

    def __init__(self, path: str | None) -> None:
        self.results: dict[str, Any] = {}
        self.failed: list[str] = []
        self._path = path

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """Note its result and seconds; None if it failed. A check that fails (RLKVError) goes on upwards."""
        began = time.perf_counter()
        try:
            self.results[name] = work()
        except Exception as error:
            self.results[name] = {"failed": f"{type(error).__name__}: {error}"}
            self.failed.append(name)
            if isinstance(error, RLKVError):
                raise
            traceback.print_exc()
        finally:
            write_json(self._path, self.results)
        print(f"--- {name}: {time.perf_counter() - began:.1f} s", flush=True)
        return None if name in self.failed else self.results[name]


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
    stages, pool = Stages(arguments.json), 0.05 if tiny else POOL
    stages.results |= card() if device == "cuda" else {}
    stages.run("check", lambda: sampling.check_tokens(device))
    model = random_llama(device, tiny)
    bandwidth = stages.run("copy_bandwidth", lambda: copy_bandwidth() if device == "cuda" else 1e10)
    sampled = stages.run(
        "sampler",
        lambda: sampling.measure(model, arguments.gates, bandwidth, pool, tiny, arguments.static),
    )
    trained = stages.run("train", lambda: train(model, tiny))
    if sampled and trained:
        fit, speed = training.fit_steps(sampled["steps"]), trained["updates"][0]["tokens/s"]
        stages.run("projection", lambda: training.project(fit, speed, POOL))
    found = stages.run("profile", lambda: profile(model, tiny))
    if found:
        print_table(found)
    if arguments.whole:
        print(stages.run("whole step", lambda: whole_step(model, *((0.3, 200) if tiny else ()))))
    if stages.failed:
        raise SystemExit(f"failed: {', '.join(stages.failed)}")


if __name__ == "__main__":
    main()
