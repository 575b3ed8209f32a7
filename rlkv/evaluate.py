"""Evaluate masks against the full cache on held-out problems: accuracy with intervals, and true KV bytes.

    results = evaluate(EvalConfig(model="pocket", gates="gates/pocket", output="runs/eval"))

All masks answer all problems greedily, in one batch: the sampler takes gates for each request. The folder
``output`` then holds config.yaml (with what empty settings came to), masks/, rows.jsonl (an answer a line, so
a killed run goes on), results.json and table.md. Nothing binds it to its settings before the first answer.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from rlkv.answers import answer_masks, read_rows
from rlkv.bench import Bench, EvalConfig
from rlkv.config import check_same, plain, read_yaml
from rlkv.config import save as save_config
from rlkv.errors import RLKVError
from rlkv.files import write_atomically
from rlkv.mask import HeadMask
from rlkv.report import Entry, markdown, summarise

__all__ = ["EvalConfig", "evaluate"]

# Settings that another run into the same folder may change: the rows that are there stay comparable.
FREE = {"output", "n", "methods", "sparsities", "random_masks", "slots", "chunk", "device", "gates"}
FREE |= {"ablation_problems", "ablation_split", "ablation_data"}  # the head scores are checked by themselves


def evaluate(config: EvalConfig, model: Any = None, tokenizer: Any = None) -> dict[str, Any]:
    """Run what is missing of the evaluation and summarise it; returns what results.json holds.

    ``model`` and ``tokenizer`` default to those that ``config`` names. Raises RLKVError for bad settings or
    input, and if ``output`` holds another evaluation.
    """
    bench = Bench(config, model, tokenizer)
    out = Path(config.output)
    answered = {mask for mask, _ in read_rows(out / "rows.jsonl")}
    check_same_run(bench, out, bool(answered))
    if bench.gates is not None:
        check_same_scores(bench, "rlkv", bench.gates.values, out, answered)
    prompts = bench.problems(config.data, config.split, config.n)
    entries = make_masks(bench, out, answered)
    masks = {entry.name: entry.mask for entry in entries}
    check_same_masks(masks, out / "masks", answered)

    def begin() -> None:
        (out / "masks").mkdir(exist_ok=True)
        for name, mask in masks.items():
            mask.save(out / "masks" / f"{name}.json")
        save_config(bench.settings, out / "config.yaml")

    print(f"{len(entries)} masks x {len(prompts)} problems, window {bench.window}, prefill {config.prefill}")
    rows = answer_masks(
        out / "rows.jsonl",
        bench.sampler(prompts),
        bench.tokenizer,
        prompts,
        {name: mask.gates() for name, mask in masks.items()},
        bench.reward,
        max_new_tokens=config.max_new_tokens,
        chunk=config.chunk,
        begin=begin,
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


def make_masks(bench: Bench, out: Path, answered: Collection[str]) -> list[Entry]:
    """The full cache, then each method's masks at each sparsity; ``answered`` have answers in ``out``."""
    config, shape = bench.config, bench.shape
    entries = [Entry("full", 0.0, "full", HeadMask.random(shape.layers, shape.kv_heads, 0.0, **made(bench)))]
    scores = {}
    if "rlkv" in config.methods and bench.gates is not None:
        scores["rlkv"] = bench.gates.values
    if "ablation" in config.methods:
        from rlkv.ablation import ablate

        used = any(name.startswith("ablation-") for name in answered)
        scores["ablation"] = ablate(bench, out / "ablation", used).values
        check_same_scores(bench, "ablation", scores["ablation"], out, answered)
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


def check_same_run(bench: Bench, out: Path, answered: bool) -> None:
    """Raise RLKVError if ``out`` holds answers of other settings, or the config.yaml of another command."""
    path = out / "config.yaml"
    old = read_yaml(path) if path.is_file() else {}
    asked, now = plain(bench.config), plain(bench.settings)
    if not old.keys() <= now.keys():
        raise RLKVError(f"{path} belongs to another command: choose another output")
    if not answered:
        return
    if not old:
        raise RLKVError(
            f"{out} holds answers without config.yaml, of unknown settings: choose another output"
        )
    # Older versions recorded empty settings as they were given.
    same = {name for name in now if old.get(name) == asked[name]}
    now = {name: value for name, value in now.items() if name not in FREE | same}
    check_same(old, now, f"{out} holds an evaluation")


def check_same_scores(
    bench: Bench, method: str, scores: torch.Tensor, out: Path, answered: Collection[str]
) -> None:
    """Raise RLKVError if an answered mask of ``method``, asked for now or not, came from other scores."""
    config, masks = bench.config, {}
    for name in sorted(answered):
        if name.startswith(f"{method}-"):
            masks[name] = HeadMask.from_scores(
                scores,
                answered_mask(out / "masks", name).requested or 0.0,
                seed=config.seed,
                rounding=config.rounding,
                tp=config.tp,
                window=bench.window,
            )
    check_same_masks(masks, out / "masks", answered)


def check_same_masks(masks: Mapping[str, HeadMask], folder: Path, answered: Collection[str]) -> None:
    """Raise RLKVError if one of ``masks`` is not the one in ``folder`` whose answers are there."""
    for name, mask in masks.items():
        if name not in answered:
            continue
        old = answered_mask(folder, name)
        if not old.full.equal(mask.full) or old.window != mask.window:
            raise RLKVError(
                f"{folder / name}.json is another mask than these settings make (other gates or head "
                f"scores?): choose another output, or delete {folder.parent}"
            )


def answered_mask(folder: Path, name: str) -> HeadMask:
    """The mask in ``folder`` that gave the answers of ``name``."""
    path = folder / f"{name}.json"
    if not path.is_file():
        raise RLKVError(
            f"{path}: no such mask file, but its answers are in {folder.parent / 'rows.jsonl'}: put it back, "
            "or choose another output"
        )
    return HeadMask.load(path)
