"""Updates of the gates of an 8B model at real lengths, and the hours of the recipe.

    python benchmarks/train_step.py --json train_step.json

First log-probabilities and the gates' gradient are held against the reference (train_check.py). Measured:
the learner's own step on a few answers whose mean is the paper's 4.3k tokens, in three ways: our forward with
all activations kept (the recipe), with layers recomputed, and transformers' forward with layers recomputed;
FLOP/s beside those of a large matrix product; memory; and where the time of the longest answer goes.
--closed 0.5 sets half of the gates to exactly 0, as late in a training run (FLOP/s still count them). With
--sampler, the decode steps that benchmarks/sampler.py measured give the sum: a rollout of 128 answers is
simulated token by token with the fitted step time, under the page pool, and all answers are taken to be
trained on (those of advantage 0 really are not). benchmarks/whole_step.py measures all of it.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_memory import MemoryWatch
from gpu_timing import card, print_table, time_calls, write_json
from kernel_times import kernel_times
from random_llama import random_gates, random_llama
from train_check import check_update, transformers_forward

from rlkv.learner import Learner, Sample, pack
from rlkv.loading import recompute_activations
from rlkv.logprobs import padded
from rlkv.penalty import Penalty
from rlkv.rewards import Verdict
from rlkv.settings import TrainConfig

LENGTHS = (7100, 6300, 5200, 4300, 3500, 2500, 1300)  # mean 4314
ANSWERS, STEPS, MEAN = 128, 186, 4300
PROMPT = 150
BUDGET = 7680  # padded tokens of a micro-batch
KEPT, AGAIN, THEIRS = WAYS = (
    "all kept",
    "layers recomputed",
    "layers recomputed, transformers' forward",
)


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


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_learner(model: Any, gates: torch.Tensor, way: str, budget: int = BUDGET) -> Learner:
    config = TrainConfig(gradient_checkpointing=way != KEPT, max_tokens_per_microbatch=budget)
    return Learner(model, gates, config, Penalty(config.penalty, config.tau, None, 10))


def learn(
    model: Any, gates: torch.Tensor, lengths: tuple[int, ...], way: str, budget: int = BUDGET
) -> dict[str, Any]:
    """Seconds and memory of one update of the gates."""
    watch = MemoryWatch()
    learner = make_learner(model, gates, way, budget)
    samples, nothing = make_samples(lengths, model.config.vocab_size), torch.zeros_like(learner.gates)
    with transformers_forward() if way == THEIRS else nullcontext():
        learner.step(samples, nothing)  # compiles and plans
        learner.gates.data.copy_(gates)  # a closed head may have opened
        wait()
        began = time.perf_counter()
        learner.step(samples, nothing)
        wait()
        seconds = time.perf_counter() - began
    tokens = sum(len(sample) for sample in samples)
    return {
        "way": way,
        "budget": budget,
        "answers": len(lengths),
        "batches": len(pack(samples, budget, padded)),
        "seconds": seconds,
        "tokens/s": tokens / seconds,
        **watch.figures(),
    }


def shares(model: Any, gates: torch.Tensor, length: int, way: str) -> dict[str, Any]:
    """Milliseconds of one answer's forward and backward pass by kind of kernel, and what the device idled."""
    learner = make_learner(model, gates, way)
    samples, nothing = make_samples((length,), model.config.vocab_size), torch.zeros_like(learner.gates)

    def step() -> None:
        learner.gates.data.copy_(gates)
        learner.step(samples, nothing)
        wait()

    with transformers_forward() if way == THEIRS else nullcontext():
        step()
        began = time.perf_counter()
        step()
        wall = 1e3 * (time.perf_counter() - began)
        times = kernel_times(step)
    return {"way": way, "tokens": length + PROMPT, "wall": wall, **times}


def step_flops(model: Any, lengths: tuple[int, ...], recomputed: bool) -> float:
    """Forward and backward without weight gradients, once more forward if recomputed; the head's products."""
    config = model.config
    head = model.get_output_embeddings().weight.numel()
    body = sum(parameter.numel() for parameter in model.parameters()) - 2 * head
    attention = 0.0
    for length in lengths:
        pairs = (length + PROMPT) ** 2 / 2
        products = 4 + 10 + 4 * recomputed
        attention += (
            products * pairs * config.num_attention_heads * config.head_dim * config.num_hidden_layers
        )
    tokens = sum(length + PROMPT for length in lengths)
    return (2 + recomputed) * 2 * body * tokens + 2 * 2 * head * sum(lengths) + attention


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


def lengths_of_a_batch() -> np.ndarray:
    """Tokens of each answer, evenly spread between 1,432 and 7,168: a mean of 4,300, the paper's."""
    return (1432 + 5736 * (np.arange(ANSWERS) + 0.5) / ANSWERS).astype(int)


def rollout_seconds(fit: np.ndarray, pool_tokens: int) -> tuple[float, float, float]:
    """Simulated seconds of one batch, its mean length, and the mean number of rows.

    All start at once, and the youngest waits (and is recomputed, which is not counted) when the pool is full.
    """
    want = lengths_of_a_batch()
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


def measure(
    model: Any, lengths: tuple[int, ...] = LENGTHS, budget: int = BUDGET, closed: float = 0.0
) -> dict[str, Any]:
    """The check, updates in each way, and where the time of the longest answer goes."""
    recompute_activations(model)
    gates = random_gates(model, closed)
    checked = check_update(model, gates, TrainConfig().window)
    rows = [learn(model, gates, lengths, way, budget) for way in WAYS]
    if torch.cuda.is_available():
        rate = product_rate()
        for row in rows:
            row["TFLOP/s"] = step_flops(model, lengths, row["way"] != KEPT) / row["seconds"] / 1e12
            row["% of product rate"] = 1e14 * row["TFLOP/s"] / rate
    parts = [shares(model, gates, max(lengths), way) for way in (KEPT, THEIRS)]
    print_table(rows)
    print_table(parts)
    return {"check": checked, "closed": closed, "updates": rows, "milliseconds": parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument(
        "--sampler", help="JSON of benchmarks/sampler.py: its decode steps give the projection"
    )
    parser.add_argument("--closed", type=float, default=0.0, help="share of gates that are exactly 0")
    parser.add_argument("--pool", type=float, default=53.7, help="GB of pages (50 GiB, as the recipe has it)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU too: to try this out")
    arguments = parser.parse_args()
    model = random_llama("cuda" if torch.cuda.is_available() else "cpu", arguments.tiny)
    lengths, budget = ((90, 40, 20), 300) if arguments.tiny else (LENGTHS, BUDGET)
    result = measure(model, lengths, budget, arguments.closed)
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
