"""Evaluate masks against the full cache on held-out problems: accuracy with intervals, and true KV bytes.

    results = evaluate(EvalConfig(model="pocket", gates="gates/pocket", output="runs/eval"))

All masks answer all problems greedily, in one batch: the sampler takes gates for each request. The folder
``output`` then holds config.yaml, masks/, rows.jsonl (an answer a line, so a killed run goes on),
results.json and table.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlkv.answers import answer_masks
from rlkv.bench import Bench, EvalConfig
from rlkv.config import plain, read_yaml
from rlkv.config import save as save_config
from rlkv.errors import RLKVError
from rlkv.files import write_atomically
from rlkv.mask import HeadMask
from rlkv.report import Entry, markdown, summarise

__all__ = ["EvalConfig", "evaluate"]

# Settings that another run into the same folder may change: the rows that are there stay comparable.
FREE = {"output", "n", "methods", "sparsities", "random_masks", "slots", "chunk", "device", "gates"}


def evaluate(config: EvalConfig, model: Any = None, tokenizer: Any = None) -> dict[str, Any]:
    """Run what is missing of the evaluation and summarise it; returns what results.json holds.

    ``model`` and ``tokenizer`` default to those that ``config`` names. Raises RLKVError for bad settings or
    input, and if ``output`` holds another evaluation.
    """
    bench = Bench(config, model, tokenizer)
    out = Path(config.output)
    prompts = bench.problems(config.data, config.split, config.n)
    check_same_run(config, out)
    entries = make_masks(bench, out)
    for entry in entries:
        claim(entry.mask, out / "masks" / f"{entry.name}.json")
    save_config(config, out / "config.yaml")
    print(f"{len(entries)} masks x {len(prompts)} problems, window {bench.window}, prefill {config.prefill}")
    rows = answer_masks(
        out / "rows.jsonl",
        bench.sampler(prompts),
        bench.tokenizer,
        prompts,
        {entry.name: entry.mask.gates() for entry in entries},
        bench.reward,
        max_new_tokens=config.max_new_tokens,
        chunk=config.chunk,
    )
    results = {
        "model": bench.name,
        "shape": bench.shape.to_dict(),
        "data": f"{bench.spec} [{config.split}]",
        "gates": config.gates,
        "window": str(bench.window),
        "prefill": config.prefill,
        "skipped_prompts": prompts.skipped,
        **summarise(entries, rows),
    }
    write_atomically(out / "results.json", json.dumps(results, indent=2) + "\n")
    write_atomically(out / "table.md", markdown(results))
    return results


def make_masks(bench: Bench, out: Path) -> list[Entry]:
    """The full cache, then each method's masks at each sparsity."""
    config, shape = bench.config, bench.shape
    entries = [Entry("full", 0.0, "full", HeadMask.random(shape.layers, shape.kv_heads, 0.0, **made(bench)))]
    scores = {}
    if "rlkv" in config.methods and bench.gates is not None:
        scores["rlkv"] = bench.gates.values
    if "ablation" in config.methods:
        from rlkv.ablation import ablate

        scores["ablation"] = ablate(bench, out / "ablation").values
    for sparsity in sorted(set(config.sparsities)):
        for method in dict.fromkeys(config.methods):
            name = f"{method}-{sparsity:g}"
            if method == "random":
                for draw in range(config.random_masks):
                    seed = config.seed * 1_000_003 + draw
                    mask = HeadMask.random(shape.layers, shape.kv_heads, sparsity, seed, **made(bench))
                    entries.append(Entry(method, sparsity, f"{name}-{draw}", mask))
                continue
            mask = HeadMask.from_scores(scores[method], sparsity, seed=config.seed, **made(bench))
            entries.append(Entry(method, sparsity, name, mask))
    return entries


def made(bench: Bench) -> dict[str, Any]:
    """What all masks of an evaluation have in common."""
    config = bench.config
    return {"window": bench.window, "model": bench.shape, "rounding": config.rounding, "tp": config.tp}


def check_same_run(config: EvalConfig, out: Path) -> None:
    """Raise RLKVError if ``output`` holds rows of an evaluation with other settings."""
    path = out / "config.yaml"
    if not path.is_file():
        return
    old = read_yaml(path)
    for name, value in plain(config).items():
        if name not in FREE and old.get(name, value) != value:
            raise RLKVError(
                f"{out} holds an evaluation with {name}={old[name]}, now it is {value}: choose another output"
            )


def claim(mask: HeadMask, path: Path) -> None:
    """Record a mask; RLKVError if the folder's rows of that name came from another one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = HeadMask.load(path) if path.is_file() else mask
    if not old.full.equal(mask.full) or old.window != mask.window:
        raise RLKVError(
            f"{path} is another mask than the one to evaluate (other gates?): choose another output, or "
            f"delete {path.parents[1]}"
        )
    mask.save(path)
