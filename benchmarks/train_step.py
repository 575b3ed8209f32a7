"""One RL step of the 8B recipe from measured parts: gate updates at real lengths, and decode steps.

    python benchmarks/train_step.py --json train_step.json

Measured: the learner's own step (mixed attention forward and backward, recomputed layers, chunked
log-probabilities, frozen weights) on a few answers whose mean is the paper's 4.3k tokens, with the Triton
kernel and without it, beside the rate of a large matrix product; peak memory; decode steps at several sizes
(benchmarks/sampler.py). The sum: a rollout of 128 answers is simulated token by token with the fitted step
time, under the page pool, and all answers are taken to be trained on (those of advantage 0 really are not).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_timing import card, print_table, time_calls, write_json
from random_llama import random_llama

from rlkv.attention import fused
from rlkv.learner import Learner, Sample, pack
from rlkv.loading import recompute_activations
from rlkv.penalty import Penalty
from rlkv.rewards import Verdict
from rlkv.settings import TrainConfig

LENGTHS = (7100, 6300, 5200, 4300, 3500, 2500, 1300)  # mean 4314
ANSWERS, STEPS, MEAN = 128, 186, 4300
PROMPT = 150


def make_samples(lengths: tuple[int, ...], vocabulary: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index, length in enumerate(lengths):
        prompt, response = (
            torch.randint(0, vocabulary, (count,), generator=generator).tolist() for count in (PROMPT, length)
        )
        advantage = 1.0 if index % 2 else -1.0
        logprobs = [-float(np.log(vocabulary))] * length
        samples.append(Sample(prompt, response, logprobs, Verdict(0.5, "correct"), advantage=advantage))
    return samples


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def learn(model: Any, lengths: tuple[int, ...], kernel: bool, budget: int = 7680) -> dict[str, Any]:
    """Seconds and peak memory of one update of the gates; gradients of the gates for comparison."""
    config = TrainConfig(gradient_checkpointing=True, max_tokens_per_microbatch=budget)
    shape = (model.config.num_hidden_layers, model.config.num_key_value_heads)
    gates = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    learner = Learner(model, gates, config, Penalty(config.penalty, config.tau, None, 10))
    samples = make_samples(lengths, model.config.vocab_size)
    before = fused.lengths_of
    if not kernel:
        fused.lengths_of = lambda *_: None
    found: dict[str, torch.Tensor] = {}
    learner.gates.register_hook(lambda grad: found.update(grad=grad + found.get("grad", 0)))
    try:
        learner.step(samples, torch.zeros(shape, device=model.device))  # compiles and plans
        found.clear()
        with torch.no_grad():
            learner.gates.copy_(gates)
        reset_peak()
        began = time.perf_counter()
        learner.step(samples, torch.zeros(shape, device=model.device))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    finally:
        fused.lengths_of = before
    tokens = sum(len(sample) for sample in samples)
    return {
        "attention": "kernel" if kernel else "chunked",
        "answers": len(lengths),
        "batches": len(pack(samples, budget)),
        "seconds": seconds,
        "tokens/s": tokens / seconds,
        "peak GiB": peak_gib(),
        "grad": found["grad"].cpu(),
    }


def step_flops(model: Any, lengths: tuple[int, ...]) -> float:
    """Forward, recomputed backward without weight gradients; the head's two products."""
    config = model.config
    head = model.get_output_embeddings().weight.numel()
    body = sum(parameter.numel() for parameter in model.parameters()) - 2 * head
    attention = 0.0
    for length in lengths:
        pairs = (length + PROMPT) ** 2 / 2
        attention += (
            (4 + 4 + 10) * pairs * config.num_attention_heads * config.head_dim * config.num_hidden_layers
        )
    tokens = sum(length + PROMPT for length in lengths)
    return 3 * 2 * body * tokens + 2 * 2 * head * sum(lengths) + attention


def product_rate() -> float:
    """FLOP/s of a large bf16 matrix product."""
    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * 8192**3 / time_calls(lambda: left @ right)


def fit_steps(steps: list[dict[str, Any]]) -> np.ndarray:
    """Seconds of a decode step with soft gates: (constant, per row, per token held), least squares."""
    soft = [step for step in steps if step["step"] == "soft"]
    parts = np.array([[1.0, step["rows"], step["tokens"]] for step in soft])
    times = np.array([step["ms"] / 1e3 for step in soft])
    return np.linalg.lstsq(parts / times[:, None], np.ones(len(soft)), rcond=None)[0]  # relative errors


def rollout_seconds(fit: np.ndarray, pool_tokens: int, seed: int = 0) -> tuple[float, float, float]:
    """Simulated seconds of one batch, its mean length, and the mean number of rows.

    Lengths are uniform between 1.4k and 7.2k (mean 4.3k); all start at once, and the youngest waits (and is
    recomputed, which is not counted) when the pool is full.
    """
    generator = np.random.default_rng(seed)
    want = generator.uniform(1432, 7168, ANSWERS).astype(int)
    done = np.zeros(ANSWERS, dtype=int)
    seconds, rows_sum, steps = 0.0, 0, 0
    while (done < want).any():
        live = np.flatnonzero(done < want)
        held = np.cumsum(done[live] + PROMPT)
        live = live[: max(1, int((held <= pool_tokens).sum()))]
        seconds += float(fit @ [1.0, len(live), (done[live] + PROMPT).sum()])
        done[live] += 1
        rows_sum, steps = rows_sum + len(live), steps + 1
    return seconds, float(want.mean()), rows_sum / steps


def project(fit: np.ndarray, train_tokens_per_second: float, pool_gb: float) -> dict[str, float]:
    """The sum that the docs show."""
    rollout, mean, rows = rollout_seconds(fit, int(pool_gb * 1e9 / 131072))
    train = ANSWERS * (mean + PROMPT) / train_tokens_per_second
    total = rollout + train
    result = {
        "rollout s": rollout,
        "rollout tokens/s": ANSWERS * mean / rollout,
        "mean rows": rows,
        "train s": train,
        "step s": total,
        "hours for 186 steps": STEPS * total / 3600,
        "hours if half the answers have advantage 0": STEPS * (rollout + train / 2) / 3600,
    }
    for name, value in result.items():
        print(f"{name}: {value:.2f}")
    return result


def measure(model: Any, lengths: tuple[int, ...] = LENGTHS, budget: int = 7680) -> dict[str, Any]:
    """Updates with the kernel, and both ways on fewer answers."""
    recompute_activations(model)
    few = lengths[3:4] or lengths
    rows = [learn(model, lengths, True, budget)]
    print(rows, flush=True)
    rows += [learn(model, few, kernel, budget) for kernel in (True, False)]
    _, ours, plain = (row.pop("grad") for row in rows)
    error = ((ours - plain).norm() / plain.norm()).item()
    print(f"gate gradients, kernel against chunked attention (bf16): relative difference {error:.3f}")
    if torch.cuda.is_available():
        rate = product_rate()
        for row, answers in zip(rows, (lengths, few, few), strict=True):
            row["TFLOP/s"] = step_flops(model, answers) / row["seconds"] / 1e12
            row["% of product rate"] = 1e14 * row["TFLOP/s"] / rate
    print_table(rows)
    return {"gradient_difference": error, "updates": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument(
        "--sampler", help="JSON of benchmarks/sampler.py: its decode steps give the projection"
    )
    parser.add_argument("--pool", type=float, default=42.9, help="GB of pages (40 GiB, as the recipe has it)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU too: to try this out")
    arguments = parser.parse_args()
    model = random_llama("cuda" if torch.cuda.is_available() else "cpu", arguments.tiny)
    result = measure(model, (90, 40, 20) if arguments.tiny else LENGTHS, 300 if arguments.tiny else 7680)
    if arguments.sampler:
        fit = fit_steps(json.loads(Path(arguments.sampler).read_text())["steps"])
        result |= {
            "fit": fit.tolist(),
            "projection": project(fit, result["updates"][0]["tokens/s"], arguments.pool),
        }
    if torch.cuda.is_available():
        result |= card()
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
