"""From rows to a table: accuracy, paired differences to the full cache, and the KV bytes requests held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rlkv.answers import Row
from rlkv.mask import HeadMask
from rlkv.rank import format_bytes
from rlkv.statistics import Estimate, compare, crossed_mean, wilson

NOTE = (
    "95 % intervals. One mask: Wilson for accuracy, Bonett-Price for paired differences. Several random "
    "masks: mean over masks, interval for new masks and problems (crossed random effects, Satterthwaite). "
    "Ablation: heads ranked by single-head ablation. Flips: answers lost / gained against the full cache, a "
    "mask. Tokens: of the answer, mean. KV bytes: keys and values that a request holds when its answer ends, "
    "mean; share: of what the full cache would hold for the same requests."
)


@dataclass(frozen=True)
class Entry:
    """One mask of an evaluation; masks of one method and requested sparsity are summarised together."""

    method: str
    requested: float
    name: str
    mask: HeadMask


def summarise(entries: Sequence[Entry], rows: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """``methods`` over all problems, and ``tasks`` -> the same for each task where there are several.

    ``rows``: mask name -> rows of the same problems in the same order; there is an entry named "full".
    """
    tasks = sorted({row.task for row in rows["full"]})
    split = {
        task: {name: [row for row in found if row.task == task] for name, found in rows.items()}
        for task in tasks
    }
    return {
        "problems": len(rows["full"]),
        "methods": summarise_task(entries, rows),
        "tasks": {task: summarise_task(entries, split[task]) for task in tasks} if len(tasks) > 1 else {},
    }


def summarise_task(entries: Sequence[Entry], rows: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """One summary for each (method, requested sparsity), in the order of ``entries``."""
    groups: dict[tuple[str, float], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.method, entry.requested), []).append(entry)
    full = scores(groups["full", 0.0], rows)
    rlkv = {sparsity: scores(group, rows) for (method, sparsity), group in groups.items() if method == "rlkv"}
    typical = round(float(np.mean([row.length for row in rows["full"]])))
    found = []
    for (method, sparsity), group in groups.items():
        table = scores(group, rows)
        summary = summarise_group(group, table, [row for entry in group for row in rows[entry.name]], typical)
        if method != "full":
            summary |= {f"{key}_full": value for key, value in difference(full, table).items()}
        if method not in ("full", "rlkv") and sparsity in rlkv:
            summary["rlkv_minus_this"] = difference(table, rlkv[sparsity])["minus"]
        found.append({"method": method, "requested": sparsity, **summary})
    return found


def scores(group: Sequence[Entry], rows: Mapping[str, Sequence[Row]]) -> np.ndarray:
    """float [masks, problems]."""
    return np.array([[row.score for row in rows[entry.name]] for entry in group])


def summarise_group(
    group: Sequence[Entry], table: np.ndarray, rows: Sequence[Row], typical: int
) -> dict[str, Any]:
    """Accuracy, lengths and bytes of the masks of one method at one sparsity."""
    lengths = [row.length for row in rows]
    share = len(rows) // len(group)
    parts = [lengths[start : start + share] for start in range(0, len(rows), share)]
    held = sum(entry.mask.kv_bytes(part) for entry, part in zip(group, parts, strict=True))
    whole = sum(entry.mask.full_bytes(part) for entry, part in zip(group, parts, strict=True))
    return {
        "sparsity": float(np.mean([entry.mask.sparsity for entry in group])),
        "masks": len(group),
        "problems": table.shape[1],
        "accuracy": asdict(accuracy(table)),
        "mean_output_tokens": float(np.mean([row.tokens for row in rows])),
        "truncated": float(np.mean([row.kind == "truncated" for row in rows])),
        "no_answer": float(np.mean([row.kind == "no_answer" for row in rows])),
        "grader_errors": sum(row.kind == "error" for row in rows),
        "kv_bytes": held / len(rows),
        "kv_share": held / whole,
        "typical_length": typical,  # of the full cache's requests: the same for all methods, for pictures
        "kv_bytes_at_typical_length": sum(entry.mask.kv_bytes(typical) for entry in group) / len(group),
    }


def accuracy(table: np.ndarray) -> Estimate:
    """Mean of ``table`` [masks, problems]: Wilson for one mask of verdicts 0 and 1, else crossed effects.

    Masks that are all right or all wrong everywhere count as one: no spread to see is not certainty.
    """
    if np.isin(table, (0, 1)).all() and (len(table) == 1 or np.ptp(table) == 0):
        return wilson(int(table[0].sum()), table.shape[1])
    return within(crossed_mean(table), 0.0, 1.0)


def within(found: Estimate, low: float, high: float) -> Estimate:
    """The interval cut to what is possible."""
    return Estimate(found.value, max(low, found.low), min(high, found.high))


def difference(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """``second - first`` with its interval (``minus``), flips a mask, and McNemar's p for one mask each.

    Tables [masks, problems]; a table of one mask stands against each mask of the other.
    """
    delta = second - first
    first, second = np.broadcast_arrays(first, second)
    flips = {
        "lost_to": float(((first == 1) & (second < 1)).sum() / len(delta)),
        "gained_on": float(((first < 1) & (second == 1)).sum() / len(delta)),
    }
    binary = np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all()
    if binary and (len(delta) == 1 or np.ptp(delta) == 0):
        paired = compare([bool(item) for item in first[0]], [bool(item) for item in second[0]])
        return {"minus": asdict(paired.difference), **flips, "mcnemar_p": paired.p_value}
    return {"minus": asdict(within(crossed_mean(delta), -1.0, 1.0)), **flips}


HEADER = (
    "method",
    "sparsity",
    "accuracy",
    "minus full",
    "flips",
    "RLKV minus this",
    "tokens",
    "cut off",
    "KV bytes",
    "share",
)
LABELS = {"full": "full cache", "rlkv": "RLKV", "random": "random", "ablation": "ablation"}


def cells(summary: Mapping[str, Any]) -> list[str]:
    """A summary as text, one cell a column of HEADER."""
    label = LABELS.get(summary["method"], summary["method"])
    if summary["masks"] > 1:
        label += f" (mean of {summary['masks']})"
    has_full = "minus_full" in summary
    return [
        label,
        f"{summary['sparsity']:.3f}",
        interval(summary["accuracy"]),
        interval(summary["minus_full"], sign="+") if has_full else "",
        f"-{count(summary['lost_to_full'])} / +{count(summary['gained_on_full'])}" if has_full else "",
        interval(summary["rlkv_minus_this"], sign="+") if "rlkv_minus_this" in summary else "",
        f"{summary['mean_output_tokens']:.0f}",
        f"{summary['truncated']:.1%}",
        format_bytes(summary["kv_bytes"]),
        f"{summary['kv_share']:.1%}",
    ]


def interval(estimate: Mapping[str, float], sign: str = "") -> str:
    """Percent (or points) with the interval in brackets."""
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def count(flips: float) -> str:
    """Whole where it is, else to a tenth."""
    return f"{flips:.0f}" if flips == round(flips) else f"{flips:.1f}"


def sections(results: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """(title, rows of cells) for all problems, and for each task."""
    parts = [(f"{results['model']}: {results['problems']} problems of {results['data']}", results["methods"])]
    parts += [(f"{task}: {found[0]['problems']} problems", found) for task, found in results["tasks"].items()]
    return [(title, [cells(summary) for summary in found]) for title, found in parts]


def markdown(results: Mapping[str, Any]) -> str:
    """table.md."""
    lines = []
    for title, rows in sections(results):
        lines += [f"**{title}** (window {results['window']}, prefill {results['prefill']})", ""]
        for row in (HEADER, ["---"] * len(HEADER), *rows):
            lines.append("| " + " | ".join(row) + " |")
        lines.append("")
    return "\n".join([*lines, NOTE, ""])


def show(results: Mapping[str, Any]) -> None:
    """Print the tables."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:  # a log: don't fold cells at 80 columns
        console = Console(width=160)
    for title, rows in sections(results):
        table = Table(title=Text(title, style="bold"), box=box.SIMPLE_HEAD, title_justify="left")
        for column in HEADER:
            table.add_column(column, justify="left" if column == "method" else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table, "", sep="")
