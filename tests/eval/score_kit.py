"""Small result folders: of our own layout, and of the authors'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eval_kit import make_row

from rlkv_eval.results import ROWS, run_name, write_info, write_rows


def write_run(
    folder: Path,
    task: str,
    method: str,
    sparsity: float,
    right: str,
    model: str = "models/Tiny-R1",
    seed: int | None = None,
    kv: float = 1.0,
) -> None:
    """One run: ``right`` has a letter for each problem, 1 right, 0 wrong, t cut off, r repeating."""
    run = folder / task / run_name(method, sparsity, seed)
    run.mkdir(parents=True)
    kinds = {"1": "correct", "0": "wrong", "t": "truncated", "r": "repetition"}
    rows = [
        make_row(
            id=str(number),
            task=task,
            method=method,
            sparsity=sparsity,
            seed=seed or 0,
            kind=kinds[letter],
            score=float(letter == "1"),
            new_tokens=100 + number,
            kv_bytes=int(kv * 2**20 * (number + 1)),
            full_kv_bytes=2**20 * (number + 1),
        )
        for number, letter in enumerate(right)
    ]
    write_rows(run / ROWS, rows)
    info = {"task": task, "method": method, "sparsity": sparsity, "seed": seed or 0, "answers": len(rows)}
    write_info(run, {**info, "model": model})


def own_folder(folder: Path, model: str = "models/Tiny-R1") -> Path:
    """Two tasks of 40 problems; at 0.25 RLKV keeps all right answers, at 0.5 it loses ten of one task."""
    full = "1" * 30 + "0" * 10
    for task in ("gsm8k", "math500"):
        write_run(folder, task, "full", 0.0, full, model)
        write_run(folder, task, "rlkv", 0.25, full, model, kv=0.8)
        write_run(folder, task, "kvzip", 0.25, "1" * 24 + "0" * 10 + "t" * 6, model, kv=0.8)
    write_run(folder, "gsm8k", "rlkv", 0.5, "1" * 20 + "t" * 12 + "r" * 8, model, kv=0.6)
    write_run(folder, "gsm8k", "random", 0.5, "1" * 10 + "0" * 30, model, seed=0, kv=0.6)
    write_run(folder, "gsm8k", "random", 0.5, "1" * 14 + "0" * 26, model, seed=1, kv=0.6)
    return folder


def write_object(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def published_folder(folder: Path) -> Path:
    """The authors' layout, all four parts, one model; numbers made up."""
    duo = "duo_attn-pattern-lr=0.02-reg=0.05-ctx=1000_32000-multi_passkey10"
    bench = {
        "gsm8k-full.jsonl": 50.04,
        "aime24-full.jsonl": 30.0,
        f"gsm8k-{duo}-sp-0.4.jsonl": 25.02,
        "gsm8k-kvzip-scbench_repoqa-0-sp-0.4.jsonl": 40.03,
        "aime24-kvzip-scbench_repoqa-0-sp-0.4.jsonl": 20.0,
        "aime24-kvzip-scbench_qa_eng-0-sp-0.4.jsonl": 23.33,
        "gsm8k-rlkv-laser_llama__lr1e-2__step185-sp-0.4.jsonl": 48.98,
    }
    write_object(folder / "bench/Tiny-R1/result.json", bench)
    sweep = {
        "gsm8k-full.jsonl": 60.05,
        "gsm8k-rlkv-llama_lr1e-2_tau0.5-s16r64-sp-0.3.jsonl": 55.04,
        "gsm8k-rlkv-llama_lr1e-2_tau0.5-s32r128-sp-0.3.jsonl": 57.01,
        "gsm8k-rlkv-llama_lr1e-2_tau0.5-s32r128-sp-0.6.jsonl": 59.97,
    }
    write_object(folder / "efficiency/pred_sweep/Tiny-R1/result.json", sweep)
    write_object(folder / "efficiency/pred_sweep/Tiny-R1/result_lengths.json", dict.fromkeys(sweep, 987.6))
    write_object(folder / "longreason/Tiny-R1/result.json", {"longreason-full.jsonl": 49.25})
    name = "math_500-rlkv-llama_lr1e-2-sp-0.5"
    for stem, seconds in (("math_500-full", 100.0), (name, 50.0)):
        write_object(folder / f"efficiency/Tiny-R1/{stem}.stats.json", stats(seconds))
    result = {"math_500-full.jsonl": 80.0, f"{name}.jsonl": 70.0}
    write_object(folder / "efficiency/Tiny-R1/result.json", result)
    errors = {"results": {f"{name}.jsonl": [30.0, 20.0, 8.0, 2.0]}, "raw": {}}
    write_object(folder / "efficiency/Tiny-R1/result_evals.json", errors)
    return folder


def stats(seconds: float) -> dict[str, Any]:
    """One timed run's record; its config says 0.5 for a full run too, as the authors' does."""
    return {
        "config": {
            "sparsity": 0.5,
            "num_samples": 10,
            "max_running_requests": 4,
            "sink_size": 16,
            "recent_size": 64,
        },
        "throughput": {
            "total_time_s": seconds,
            "total_input_tokens": 1000,
            "avg_gen_throughput_tok_s": 9000 / seconds,
            "avg_req_throughput_req_s": 10 / seconds,
            "avg_latency_per_req_s": seconds / 10,
            "total_output_tokens": 9000,
        },
        "token_stats": {"avg_output_tokens": 900.0, "min_output_tokens": 5, "hit_max_tokens": 1},
    }
