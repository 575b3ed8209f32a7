"""The table of scripts/bench_efficiency.sh: every arm beside stock SGLang and what memory allows at most."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rlkv.window import Window


def ceiling(figures: dict[str, Any]) -> float:
    """Requests that fit where one fits in stock, at the run's mean length L: 1 / ((1 - s) + s W / L)."""
    length = figures["prompt"] + figures["output"] / 2
    sparsity, window = figures["sparsity"], Window.parse(figures["window"]).size
    return 1 / ((1 - sparsity) + sparsity * min(1.0, window / length))


def rows(folder: Path) -> list[list[str]]:
    """One row an arm; a latency is there when the run measured it."""
    stock = json.loads((folder / "stock.json").read_text())
    table = [
        [
            "arm",
            "tokens/s",
            "x stock",
            "ceiling",
            "alone",
            "KV GiB",
            "tokens held",
            "TTFT p50/p99",
            "ITL p50/p99",
        ]
    ]
    for path in [folder / "stock.json", *sorted(folder.glob("rlkv-*.json"))]:
        figures = json.loads(path.read_text())
        masked = figures["arm"] == "rlkv"
        table.append(
            [
                f"s = {figures['sparsity']}" if masked else "stock",
                f"{figures['output_tokens_per_second']:.0f}",
                f"{figures['output_tokens_per_second'] / stock['output_tokens_per_second']:.2f}",
                f"{ceiling(figures):.2f}" if masked else "1",
                f"{figures['alone'] / stock['alone']:.3f}",
                f"{figures['kv_gib_allocated']:.1f}",
                str(figures["kv_tokens"]),
                *(_latency(figures.get(name)) for name in ("ttft_ms", "itl_ms")),
            ]
        )
    return table


def _latency(found: dict[str, float] | None) -> str:
    return f"{found['p50']:.0f}/{found['p99']:.0f} ms" if found else "-"


if __name__ == "__main__":
    table = rows(Path(sys.argv[1]))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
