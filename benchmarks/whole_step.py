"""One whole RL step of scripts/train_llama-8b-r1.sh on a random Llama-8B, as the trainer does it: 3 min.

    python benchmarks/whole_step.py --json whole_step.json

128 answers (32 prompts of 150 tokens, 4 samples each) whose lengths are evenly spread between 1,432 and
7,168 tokens (mean 4,300, the paper's) are sampled with soft gates on the paged sampler, each stopped at its
own length; the pages' memory is given back; the learner updates the gates on all of them. A random model
writes no answer that could be graded, so verdicts are drawn: in every group some are right and some wrong,
and no answer is left out. Nothing is projected but the hours: 186 such steps. Before, log-probabilities and
the gates' gradient are held against the reference (train_check.py). --closed 0.5 sets half of the gates to
exactly 0, as late in a training run: rollout and update skip what those heads don't see.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from typing import Any

import numpy as np
import torch
from gpu_memory import MemoryWatch
from gpu_timing import card, print_table, write_json
from random_llama import random_gates, random_llama
from train_check import check_update
from train_step import ANSWERS, PROMPT, STEPS, lengths_of_a_batch, wait

from rlkv.learner import Learner, Sample, pack
from rlkv.logprobs import padded
from rlkv.paged import PagedSampler
from rlkv.paged import sampler as paged_sampler
from rlkv.penalty import Penalty
from rlkv.rewards import Verdict
from rlkv.sampler import SamplingParams
from rlkv.settings import TrainConfig
from rlkv.window import Window

GROUP = 4


class EachItsLength:
    """``make_jobs``, with a limit for each request."""

    def __init__(self, limits: list[int]) -> None:
        self._limits, self._make = limits, paged_sampler.make_jobs

    def __call__(self, *arguments: Any) -> deque[Any]:
        jobs = self._make(*arguments)
        for job in jobs:
            job.limit = self._limits[job.index]
        return jobs

    def __enter__(self) -> None:
        paged_sampler.make_jobs = self  # type: ignore[assignment]

    def __exit__(self, *_: Any) -> None:
        paged_sampler.make_jobs = self._make


def plan_shapes(model: Any, samples: list[Sample], budget: int) -> float:
    """Seconds of the first attention of each shape, for which cuDNN then has a plan."""
    if not torch.cuda.is_available():
        return 0.0
    from rlkv.kernels.mixed import mixed_attention

    config, began = model.config, time.perf_counter()
    heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    gates = torch.full((groups,), 0.5, device="cuda", requires_grad=True)
    for rows, length in sorted(
        {(len(batch), padded(len(batch[0]))) for batch in pack(samples, budget, padded)}
    ):
        joined = torch.zeros(rows * length, heads + 2 * groups, dim, dtype=model.dtype, device="cuda")
        query, key = joined[:, :heads].contiguous(), joined[:, heads : heads + groups].contiguous()
        value = joined[:, heads + groups :]
        output = mixed_attention(query, key, value, gates, [length] * rows, Window(128, 256), dim**-0.5)
        output.sum().backward()
    wait()
    return time.perf_counter() - began


def whole_step(model: Any, kv_gib: float = 50.0, scale: int = 1, closed: float = 0.0) -> dict[str, Any]:
    """Seconds, tokens and memory of rollout and update; ``scale`` divides the lengths."""
    limits = [max(length // scale, 2) for length in lengths_of_a_batch()]
    limits = [int(length) for length in np.random.default_rng(1).permutation(limits)]
    config = TrainConfig(gradient_checkpointing=False)
    gates = random_gates(model, closed)
    checked = check_update(model, gates, config.window)
    learner = Learner(model, gates, config, Penalty(config.penalty, config.tau, None, 10))
    sampler = PagedSampler(
        model, Window(128, 256), slots=ANSWERS, max_length=7680, kv_bytes=int(kv_gib * 2**30), release=True
    )
    generator = torch.Generator().manual_seed(5)
    texts = torch.randint(0, 20000, (ANSWERS // GROUP, PROMPT), generator=generator).tolist()
    prompts = [text for text in texts for _ in range(GROUP)]
    vocabulary = model.config.vocab_size
    # graphs and kernels of every number of rows, once a run
    warm = SamplingParams(max_new_tokens=48, stop_ids=(vocabulary,))
    with EachItsLength([9 + index // 3 for index in range(ANSWERS)]):
        sampler.generate(prompts, warm, gates)
    params = SamplingParams(max_new_tokens=max(limits), stop_ids=(vocabulary,), seed=1)
    watch = MemoryWatch()
    began = time.perf_counter()
    with EachItsLength(limits):
        done = sampler.generate(prompts, params, gates, on_finish=watch.look)
    wait()
    rollout, memory = time.perf_counter() - began, watch.figures("rollout ")
    samples = [
        Sample(prompt, one.tokens, one.logprobs, Verdict(float(index % GROUP < 2), "correct"))
        for index, (prompt, one) in enumerate(zip(prompts, done, strict=True))
    ]
    groups = [samples[start : start + GROUP] for start in range(0, ANSWERS, GROUP)]
    result: dict[str, Any] = {
        "check": checked,
        "closed": closed,
        "answers": ANSWERS,
        "response tokens": sum(limits),
        "rollout s": rollout,
        "rollout tokens/s": sum(limits) / rollout,
        **memory,
        "preemptions": sampler.preemptions,
        "pages used GiB": sampler.pool.most_used / len(sampler.pool.owners) * kv_gib,
    }
    print(result, flush=True)
    result["planning s, once a run"] = plan_shapes(model, samples, config.max_tokens_per_microbatch)
    watch = MemoryWatch()
    began = time.perf_counter()
    values = learner.update(groups, 0)
    wait()
    update = time.perf_counter() - began
    result |= {
        "update s": update,
        "update tokens/s": sum(map(len, samples)) / update,
        **watch.figures("update "),
        "step s": rollout + update,
        "hours for 186 steps": STEPS * (rollout + update) / 3600,
        "hours if half the answers have advantage 0": STEPS * (rollout + update / 2) / 3600,
        "values of the last update": values,
    }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json")
    parser.add_argument("--pool", type=float, default=50.0, help="GiB of pages")
    parser.add_argument("--closed", type=float, default=0.0, help="share of gates that are exactly 0")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU too: to try this out")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = random_llama(device, arguments.tiny)
    pool, scale = (0.3, 200) if arguments.tiny else (arguments.pool, 1)
    result = whole_step(model, pool, scale, arguments.closed)
    print_table(
        [{"": name, "value": value} for name, value in result.items() if isinstance(value, float | int)]
    )
    if device == "cuda":
        result |= card()
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
