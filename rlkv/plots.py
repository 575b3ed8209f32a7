"""The pictures of a run: gates.png (heat map), training.png (curves), accuracy_kv.png (accuracy by bytes)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rlkv.errors import RLKVError
from rlkv.gates import HeadGates

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}
# Okabe and Ito's colours, told apart without colour vision too; markers differ as well.
LOOKS = {
    "full": ("#000000", "*"),
    "rlkv": ("#0072B2", "o"),
    "random": ("#999999", "s"),
    "ablation": ("#D55E00", "^"),
}
LABELS = {"full": "full cache", "rlkv": "RLKV", "ablation": "single-head ablation"}

# One panel each: title, the metrics drawn in it with their legend, and the y range (None: free).
PANELS: list[tuple[str, list[tuple[str, str]], tuple[float, float] | None]] = [
    ("reward of the samples", [("reward", "")], (0, 1)),
    ("held-out accuracy", [("validation_gates", "soft gates"), ("validation_mask", "mask")], (0, 1)),
    ("mean gate", [("gate_mean", "")], (0, 1)),
    ("fraction of gates below 0.5", [("sparsity", "")], (0, 1)),
    ("answer length, tokens", [("response_length", "")], None),
    ("answers cut off", [("truncated", "")], (0, 1)),
]


def draw_folder(folder: str | Path, output: str | Path | None = None) -> list[Path]:
    """Draw what ``folder`` has the numbers for into ``output`` (default: the same); returns the paths.

    gates.tsv -> gates.png, metrics.jsonl -> training.png, results.json -> accuracy_kv.png. Raises RLKVError
    when the folder is missing or has none of them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RLKVError(f"{folder}: no such folder")
    target = Path(output) if output else folder
    drawn = []
    if (folder / "gates.tsv").is_file():
        drawn.append(save(gate_map(HeadGates.load(folder)), target / "gates.png"))
    metrics = folder / "metrics.jsonl"
    if metrics.is_file() and metrics.stat().st_size:
        drawn.append(save(training_curves(read_lines(metrics)), target / "training.png"))
    if (folder / "results.json").is_file():
        results = json.loads((folder / "results.json").read_text())
        drawn.append(save(accuracy_for_bytes(results), target / "accuracy_kv.png"))
    if not drawn:
        raise RLKVError(f"{folder}: nothing to draw; it has no gates.tsv, metrics.jsonl or results.json")
    return drawn


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; a last line still being written is left out."""
    text = path.read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise RLKVError(f"{path}: not JSON lines ({error})") from None


def gate_map(gates: HeadGates, title: str = "") -> Figure:
    """Layers down, KV heads across, one cell a gate, on a fixed scale from 0 (local) to 1 (full)."""
    values = gates.values
    layers, heads = values.shape
    side = min(0.3, 7.0 / layers)  # inches a cell
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            figsize=(max(2.6, heads * max(side, 0.22)) + 1.3, layers * side + 1.0), layout="constrained"
        )
        axes.grid(False)
        image = axes.imshow(
            values.numpy(), cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest"
        )
        if values.numel() <= 512:  # thin white lines between cells
            axes.set_xticks(torch.arange(heads - 1) + 0.5, minor=True)
            axes.set_yticks(torch.arange(layers - 1) + 0.5, minor=True)
            axes.grid(which="minor", color="white", linewidth=0.8)
            axes.tick_params(which="minor", length=0)
        axes.spines[:].set_visible(False)
        axes.set(xlabel="KV head", ylabel="layer", title=title or gate_title(gates))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=min(heads, 8), integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=min(layers, 12), integer=True))
        bar = figure.colorbar(image, ax=axes, ticks=[0, 0.25, 0.5, 0.75, 1], shrink=0.9, aspect=25, pad=0.03)
        bar.ax.set_yticklabels(["0 local", "0.25", "0.5", "0.75", "1 full"])
        bar.outline.set_visible(False)
    return figure


def gate_title(gates: HeadGates) -> str:
    """Name, and the mean of the gates."""
    name = Path(gates.model.name).name if gates.model and gates.model.name else ""
    return f"{name + ': ' if name else ''}mean gate {gates.values.mean().item():.2f}"


def training_curves(metrics: Sequence[Mapping[str, float]]) -> Figure:
    """Small multiples over the training step; a panel without numbers is left out."""
    panels = [panel for panel in PANELS if any(key in row for key, _ in panel[1] for row in metrics)]
    if not panels:
        raise RLKVError("metrics: no known curve in it")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            rows,
            columns,
            figsize=(2.5 * columns, 1.75 * rows),
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
        for axes, (title, curves, limits) in zip(grid.flat, panels, strict=False):
            draw_curves(axes, curves, metrics)
            axes.set_title(title)
            if limits:
                axes.set_ylim(limits[0] - 0.03, limits[1] + 0.03)
            else:
                axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        for index in range(len(panels)):
            if index + columns >= len(panels):
                grid.flat[index].set_xlabel("step")
                grid.flat[index].tick_params(labelbottom=True)
    return figure


def draw_curves(
    axes: Axes, curves: Sequence[tuple[str, str]], metrics: Sequence[Mapping[str, float]]
) -> None:
    """Lines of one panel; few points get markers."""
    for (key, label), (colour, marker) in zip(curves, (LOOKS["rlkv"], LOOKS["ablation"]), strict=False):
        points = [(row["step"], row[key]) for row in metrics if key in row]
        if points:
            steps, values = zip(*points, strict=True)
            dots = marker if len(points) <= 30 else ""
            axes.plot(steps, values, color=colour, marker=dots, markersize=3, label=label, clip_on=False)
    if len(curves) > 1:
        axes.legend(loc="lower left", handlelength=1.2, borderaxespad=0.1)


def accuracy_for_bytes(results: Mapping[str, Any]) -> Figure:
    """Accuracy with 95 % intervals against the KV bytes of one request, a panel a task and one for all.

    Bytes are those of a request of the full cache's mean length, so that a mask that rambles or stops early
    is not moved sideways.
    """
    parts = [("all problems", results["methods"]), *results["tasks"].items()]
    columns = min(len(parts), 4)
    rows = -(-len(parts) // columns)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            rows,
            columns,
            figsize=(max(3.6, 2.7 * columns), 2.5 * rows + 0.4),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for axes, (title, methods) in zip(grid.flat, parts, strict=False):
            draw_methods(axes, methods)
            axes.set_title(f"{title} (n = {methods[0]['problems']})")
        for axes in grid.flat[len(parts) :]:
            axes.remove()
        for axes in grid[:, 0]:
            axes.set_ylabel("accuracy")
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=2 if columns == 1 else 4, handlelength=1.6
        )
    return figure


def draw_methods(axes: Axes, methods: Sequence[Mapping[str, Any]]) -> None:
    """One panel: the full cache as a dashed line, each method with error bars."""
    full = next(summary for summary in methods if summary["method"] == "full")
    unit, scale = byte_unit(full["kv_bytes_at_typical_length"])
    right = full["kv_bytes_at_typical_length"] / scale
    axes.axhline(full["accuracy"]["value"], color=LOOKS["full"][0], linestyle="--", linewidth=1.1)
    axes.plot(
        [right],
        [full["accuracy"]["value"]],
        "*",
        color="black",
        markersize=9,
        label=LABELS["full"],
        clip_on=False,
    )
    for method in dict.fromkeys(summary["method"] for summary in methods if summary["method"] != "full"):
        points = [summary for summary in methods if summary["method"] == method]
        points.sort(key=lambda summary: summary["kv_bytes_at_typical_length"])
        values = [summary["accuracy"]["value"] for summary in points]
        below = [max(0.0, summary["accuracy"]["value"] - summary["accuracy"]["low"]) for summary in points]
        above = [max(0.0, summary["accuracy"]["high"] - summary["accuracy"]["value"]) for summary in points]
        colour, marker = LOOKS["rlkv" if method.startswith("RLKV") else method]  # "RLKV, seed 1" in a study
        masks = points[0]["masks"]
        label = LABELS.get(method, method) + (f" (mean of {masks})" if masks > 1 else "")
        axes.errorbar(
            [summary["kv_bytes_at_typical_length"] / scale for summary in points],
            values,
            yerr=[below, above],
            color=colour,
            marker=marker,
            markersize=4.5,
            capsize=2.5,
            elinewidth=1,
            label=label,
        )
    axes.set(xlim=(0, right * 1.06), ylim=(-0.03, 1.03))
    axes.set_xlabel(f"KV of a request of {full['typical_length']} tokens, {unit}")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))


def byte_unit(size: float) -> tuple[str, int]:
    """The binary unit in which ``size`` bytes read well, and its bytes."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return unit, scale
    return "bytes", 1


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG and free the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)
    plt.close(figure)
    return path
