"""Whole answers at equal memory: the same requests, the same pages, every head full against half of them.

    python benchmarks/equal_memory.py --gates GATES --json equal_memory.json

44 requests of 3,136 + 2,048 tokens (fixed lengths; mean length while writing 4,160) through ``generate`` of
the paged sampler on a random Llama-8B, window 16 + 64, with 16 GB of pages: these hold 23.5 such requests in
full at their end, and 46 with half of the heads local. So with full heads about half of the requests write
while the others wait, and with half of the heads local all of them write at once: two waves against one,
the pages nearly full in both. Everything is in the time: prompts, requests that must give their pages back
and are processed again, refills. Graphs and kernels are made before, once, as a server's are.

On an H100 (docs/results/rl_step): a step reads 15 GB of weights and up to 16 GB of keys and values, 10.5 and
10.7 ms; 4,096 steps of 22 rows on average take 43 s, 2,048 of 44 take 22 s; prompts (138,000 tokens, and
those that come back) 6.6 and 5.0 s. Together 77 s, about 2 min with the check, the model and the preparation.
The gain of the decode steps is bounded by bytes (1.98 with the weights), that of the whole by the prompts'
share of the time as well: 1.84.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from gpu_memory import MemoryWatch
from gpu_timing import card, copy_bandwidth, print_table, write_json
from random_llama import random_llama, weight_bytes
from sampler import DEPLOYED, Gates, held_bytes, mask_gates
from sampler_checks import check_tokens
from whole_step import EachItsLength

from rlkv.errors import RLKVError
from rlkv.paged import PagedSampler
from rlkv.paged.state import Run
from rlkv.sampler import SamplingParams

REQUESTS, PROMPT, NEW, POOL = 44, 3136, 2048, 16.0  # POOL in GB


class Watched(PagedSampler):
    """Notes the seconds of prompts, and the lengths of the live rows in every round of steps."""

    def begin_notes(self) -> None:
        self.prompt_seconds, self.lengths = 0.0, list[list[int]]()

    def _admit(self, run: Run) -> None:
        began = time.perf_counter()  # nothing is under way: finished rows were looked up
        super()._admit(run)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self.prompt_seconds += time.perf_counter() - began

    def _decode(self, run: Run) -> None:
        super()._decode(run)
        middle = (self._every - 1) // 2  # of the round
        self.lengths.append([live.at - middle for live in run.live.values()])


def arm(
    sampler: Watched, prompts: list[list[int]], new: int, gates: Gates, bandwidth: float
) -> dict[str, Any]:
    """One timed ``generate``."""
    vocabulary, watch = sampler.model.config.vocab_size, MemoryWatch()
    sampler.begin_notes()
    began = time.perf_counter()
    done = sampler.generate(prompts, SamplingParams(max_new_tokens=new, stop_ids=(vocabulary,)), gates)
    seconds = time.perf_counter() - began
    if any(len(one.tokens) != new for one in done):
        raise RLKVError("equal memory: an answer is not of the length asked for")
    rounds = [lengths for lengths in sampler.lengths if lengths]
    rows, tokens = sum(map(len, rounds)), sum(map(sum, rounds))
    must = len(rounds) * weight_bytes(sampler.model) + sum(held_bytes(sampler, one, gates) for one in rounds)
    decode, limit = seconds - sampler.prompt_seconds, sampler._every * must / bandwidth
    return {
        "seconds": seconds,
        "tokens/s": len(prompts) * new / seconds,
        "prompt s": sampler.prompt_seconds,
        "decode s": decode,
        "steps": len(rounds) * sampler._every,
        "mean rows": rows / len(rounds),
        "mean length": tokens / rows,
        "% limit of steps": 100 * limit / decode,
        "came back": sampler.preemptions,
        "pages used": sampler.pool.most_used / (len(sampler.pool.owners) - 1),
        **watch.figures(),
    }


def warm(sampler: Watched, prompts: list[list[int]], gates: Gates) -> None:
    """Kernels of the prompts, and a graph for every number of rows."""
    stop = (sampler.model.config.vocab_size,)
    sampler.begin_notes()
    sampler.generate(prompts[:5], SamplingParams(max_new_tokens=2, stop_ids=stop), gates)
    short = [prompt[:16] for prompt in prompts]
    with EachItsLength([9 + 8 * (index // 3) for index in range(len(short))]):
        sampler.generate(short, SamplingParams(max_new_tokens=160, stop_ids=stop), gates)


def equal_memory(model: Any, gates_path: str | None, bandwidth: float, tiny: bool = False) -> dict[str, Any]:
    """Both arms, and the gain of the second."""
    requests, prompt, new, pool = (5, 400, 200, 0.0011) if tiny else (REQUESTS, PROMPT, NEW, POOL)
    config = model.config
    mask = mask_gates(None if tiny else gates_path, config.num_hidden_layers, config.num_key_value_heads)
    sampler = Watched(model, DEPLOYED, slots=requests, max_length=prompt + new, kv_bytes=int(pool * 1e9))
    generator = torch.Generator().manual_seed(4)
    prompts = torch.randint(0, 20000, (requests, prompt), generator=generator).tolist()
    rows = []
    for name, gates in (("full", None), ("mask 0.5", mask)):
        warm(sampler, prompts, gates)
        rows.append({"heads": name, **arm(sampler, prompts, new, gates, bandwidth)})
        print(rows[-1], flush=True)
    print_table(rows)
    full, half = rows
    length = [prompt + new // 2]
    gain, steps_gain = half["tokens/s"] / full["tokens/s"], full["decode s"] / half["decode s"]
    bytes_allow = held_bytes(sampler, length, None) / held_bytes(sampler, length, mask)
    print(f"equal memory ({pool} GB), whole answers: mask over full {gain:.2f}x; decode steps alone "
          f"{steps_gain:.2f}x; bytes allow {bytes_allow:.2f}x")  # fmt: skip
    return {
        "requests": requests, "prompt": prompt, "new": new, "pool GB": pool, "window": str(DEPLOYED),
        "arms": rows, "gain": gain, "gain of decode steps": steps_gain, "bytes allow": bytes_allow,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gates", help="a gates table whose heads the mask follows")
    parser.add_argument("--json")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU too: to try this out")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checked = check_tokens(device)
    model = random_llama(device, arguments.tiny)
    bandwidth = copy_bandwidth() if device == "cuda" else 1e10
    result = {"check": checked, **equal_memory(model, arguments.gates, bandwidth, arguments.tiny)}
    if device == "cuda":
        result |= {**card(), "copy_bandwidth": bandwidth}
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
