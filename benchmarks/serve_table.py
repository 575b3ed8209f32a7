"""The table of serve_compare.py: every arm beside stock SGLang, and what memory allows at most."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from serve_work import Work, adjusted

from rlkv.window import Window

FIELDS = ("prompt", "output", "requests", "rate", "seconds")
COLUMNS = [
    "work",
    "arm",
    "tokens/s",
    "x stock",
    "runs",
    "at most",
    "running",
    "length",
    "TTFT p50/p99",
    "ITL p50/p99",
]


def ceiling(config: dict[str, Any], work: Work) -> float:
    """Requests that fit where one fits in stock, at the mean length L: 1 / ((1 - s) + s W / L)."""
    sparsity, window = config["sparsity"], Window.parse(config["window"]).size
    return 1 / ((1 - sparsity) + sparsity * min(1.0, window / work.resident))


def rows(folder: Path) -> list[list[str]]:
    """One row a work and arm: medians of its runs, and the ratios of the runs beside the stock arm's."""
    paths = [folder / "stock.json", *sorted(folder.glob("[0-9]*.json"), key=lambda path: float(path.stem))]
    arms = {path.stem: json.loads(path.read_text()) for path in paths}
    table = [COLUMNS]
    for work in dict.fromkeys(run["work"] for run in arms["stock"]["results"] if run["work"] != "profile"):
        stock = _runs(arms["stock"], work)
        for name, arm in arms.items():
            runs, config = _runs(arm, work), arm["config"]
            named = adjusted(work, {field: config[field] for field in FIELDS})
            bound = named.kind == "steady" and name != "stock"
            ratios = [
                a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(runs, stock, strict=True)
            ]
            speed = statistics.median(run["tokens_per_second"] for run in runs)
            table.append(
                [
                    work,
                    name if name == "stock" else f"s = {name}",
                    f"{speed:.1f}" if speed < 1000 else f"{speed:.0f}",
                    f"{statistics.median(ratios):.3f}",
                    f"{min(ratios):.3f}-{max(ratios):.3f}" if len(runs) > 1 else "1",
                    f"{ceiling(config, named):.2f}" if bound else "-",
                    *(f"{runs[0][key]:.0f}" if key in runs[0] else "-" for key in ("running", "resident")),
                    *(_latency(runs[0].get(key)) for key in ("ttft_ms", "itl_ms")),
                ]
            )
    return table


def _runs(arm: dict[str, Any], work: str) -> list[dict[str, Any]]:
    return [run for run in arm["results"] if run["work"] == work]


def _latency(found: dict[str, float] | None) -> str:
    return f"{found['p50']:.0f}/{found['p99']:.0f} ms" if found else "-"


def print_table(folder: Path) -> None:
    table = rows(folder)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


if __name__ == "__main__":
    print_table(Path(sys.argv[1]))
