"""What a run says of itself at its end: a table on the screen, and summary.json in its folder."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from rlkv.files import write_atomically
from rlkv.statistics import Estimate
from rlkv_eval.results import FULL, Results
from rlkv_eval.statistics import (
    MARGIN,
    Comparison,
    NoiseFloor,
    Summary,
    frontier,
    noise_floor,
    problems_needed,
    summarise,
)

HEADER = ("method", "sparsity", "accuracy", "minus full", "lost / gained", "p", "verdict", "not right", "KV")


def finish(results: Results) -> None:
    """Write summary.json and print the tables. Runs still under way elsewhere are left out."""
    results = Results(results.folder, tuple(run for run in results.runs if run.complete))
    found, floors = summarise(results), floors_of(results)
    record = {
        "near_lossless_margin": MARGIN,
        "largest_near_lossless_sparsity": {
            method: frontier(results, method) for method in results.methods if method != FULL
        },
        "noise_floor": {task: asdict(floor) for task, floor in floors.items()},
        "runs": [as_record(each) for each in found],
    }
    write_atomically(results.folder / "summary.json", json.dumps(record, indent=2) + "\n")
    show(found, floors)
    print(f"written to {results.folder}: summary.json, <task>/<run>/rows.jsonl and run.json")


def floors_of(results: Results) -> dict[str, NoiseFloor]:
    """The noise floor of each task whose full cache ran twice."""
    pairs = {task: (results.full(task), results.repeat(task)) for task in results.tasks}
    return {task: noise_floor(full, repeat) for task, (full, repeat) in pairs.items() if full and repeat}


def as_record(found: Summary) -> dict[str, Any]:
    """JSON's types; nan, which JSON lacks, as null."""
    record = asdict(found)
    if found.comparison:
        record["comparison"]["verdict"] = found.comparison.verdict
        if math.isnan(found.comparison.p_value):
            record["comparison"]["p_value"] = None
    return record


def show(found: list[Summary], floors: dict[str, NoiseFloor]) -> None:
    """Print a table a task."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:  # a log: don't fold cells at 80 columns
        console = Console(width=160)
    for task in dict.fromkeys(each.task for each in found):
        part = [each for each in found if each.task == task]
        title = f"{task}: {part[0].problems} problems, {part[0].samples} sample(s) each"
        table = Table(title=Text(title, style="bold"), box=box.SIMPLE_HEAD, title_justify="left")
        for column in HEADER:
            table.add_column(
                column, justify="left" if column in ("method", "verdict", "not right") else "right"
            )
        for each in part:
            table.add_row(*map(Text, cells(each)))
        console.print(table)
        if task in floors:
            console.print(Text(floor_sentence(floors[task])))


def cells(found: Summary) -> list[str]:
    """A summary as text, one cell a column of HEADER."""
    label = found.method + (f" (mean of {found.runs})" if found.runs > 1 else "")
    kinds = sorted(found.kinds.items(), key=lambda pair: -pair[1])
    errors = ", ".join(f"{kind} {share:.1%}" for kind, share in kinds if kind != "correct")
    share = "" if found.kv_share is None else f"{found.kv_share:.1%}"
    return [
        label,
        f"{found.true_sparsity:.3f}",
        percent(found.accuracy),
        *comparison_cells(found.comparison),
        errors,
        share,
    ]


def comparison_cells(found: Comparison | None) -> list[str]:
    """Difference, flips, p and verdict against the full cache."""
    if found is None:
        return ["", "", "", ""]
    p = "" if math.isnan(found.p_value) else f"{found.p_value:.3g}"
    return [percent(found.difference, "+"), f"-{found.lost} / +{found.gained}", p, found.verdict]


def percent(estimate: Estimate, sign: str = "") -> str:
    """Percent (or points) with the interval in brackets."""
    value, low, high = (100 * part for part in (estimate.value, estimate.low, estimate.high))
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def floor_sentence(floor: NoiseFloor) -> str:
    """The noise floor in words."""
    share = floor.flips / floor.problems
    within = f"; 95 % of such pairs stay within {100 * floor.points:.1f}" if floor.flips else ""
    return (
        f"noise floor: two full-cache runs differ in {floor.flips} of {floor.problems} problems, "
        f"{percent(floor.difference, '+')} points{within}. "
        f"With so many flips, a method that loses nothing needs {problems_needed(share)} problems to be "
        f"shown near-lossless at a margin of {100 * MARGIN:g} points (power 80 %)"
    )
