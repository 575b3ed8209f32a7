"""Accuracy against sparsity, or against the KV bytes that a request really holds; 95 % bands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from rlkv.plots import byte_unit
from rlkv_eval.figures.style import INK, label_lines, look, panels
from rlkv_eval.names import method_order, method_title, task_title
from rlkv_eval.scores import Score, Scores

COLUMNS, NAMES_A_LINE = 4, 7
VARIANT_LOOKS = (("#0072B2", "o", "-"), ("#E69F00", "s", "-"), ("#882255", "^", "-"), ("#009E73", "D", "-"))

Setting = tuple[str, str]  # method, variant
Look = tuple[str, str, Any]  # colour, marker, line style


def models_by_tasks(scores: Scores, tasks: Sequence[str]) -> Figure:
    """A row of panels for each model, a column for each task; a task has one scale for all models."""
    cells = [[(model, task) for task in tasks] for model in scores.models]
    return grid(scores, cells, by_bytes=False)


def one_model(scores: Scores, model: str, by_bytes: bool = False) -> Figure:
    """All tasks of one model, four panels a row."""
    tasks = scores.tasks
    cells = [
        [(model, task) for task in tasks[start : start + COLUMNS]] for start in range(0, len(tasks), COLUMNS)
    ]
    return grid(scores, cells, by_bytes)


def grid(scores: Scores, cells: list[list[tuple[str, str]]], by_bytes: bool) -> Figure:
    """Panels as laid out in ``cells``. A single panel names its lines beside them, more share a legend.

    So does one against bytes, where all lines end in the full cache.
    """
    several_models = len({model for row in cells for model, _ in row}) > 1
    alone = len(cells) == len(cells[0]) == 1
    looks = choose_looks(scores.settings)
    lines = -(-(1 + len(looks)) // NAMES_A_LINE)
    named = alone and not by_bytes
    size = (3.3, 2.5, 0.0) if named else (4.6, 2.5, 0.0) if alone else (1.9, 1.6, 0.2 + 0.2 * lines)
    figure, axes = panels(len(cells), len(cells[0]), *size)
    ends = []
    for i, row in enumerate(cells):
        for j, (model, task) in enumerate(row):
            same_scale = scores.where(task=task) if several_models else scores.where(model=model, task=task)
            panel = axes[i][j]
            panel.set_ylim(0, top(same_scale))
            ends = draw(panel, scores.where(model=model, task=task), looks, by_bytes)
            panel.set_title(task_title(task) if i == 0 or not several_models else "")
            panel.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        axes[i][0].set_ylabel(f"{row[0][0]}\naccuracy, %" if several_models else "accuracy, %")
        for panel in axes[i][len(row) :]:
            panel.remove()
    label = "sparsity, % (of KV heads made local, or of tokens dropped)"
    if named:
        label_lines(axes[0][0], ends)
        axes[0][0].set_xlabel("sparsity, %")
    else:
        if not by_bytes:
            figure.supxlabel(label, fontsize=8, color=INK)
        legend(figure, scores, looks, beside=alone)
    return figure


def legend(figure: Figure, scores: Scores, looks: dict[Setting, Look], beside: bool) -> None:
    """Rows above the panels, or a column right of them, each name in its colour."""
    handles = [Line2D([], [], color="black", linestyle="--", linewidth=0.9, label="full cache")]
    for setting, (colour, marker, dash) in sorted(looks.items(), key=lambda pair: -method_order(pair[0][0])):
        width = 1.9 if stands_out(setting, looks) else 1.1
        name = method_title(setting[0], shown_variant(scores, setting))
        handles.append(
            Line2D([], [], color=colour, marker=marker, linestyle=dash, linewidth=width, label=name)
        )
    box = figure.legend(
        handles=handles,
        loc="outside right center" if beside else "outside upper center",
        ncols=1 if beside else min(len(handles), NAMES_A_LINE),
        handlelength=1.8,
        columnspacing=1.4,
    )
    for text, handle in zip(box.get_texts(), handles, strict=True):
        text.set_color(str(handle.get_color()))


def choose_looks(settings: Sequence[Setting]) -> dict[Setting, Look]:
    """The method's own look; variants of it are dashed, and coloured apart where there is one method only."""
    if len(settings) > 1 and len({method for method, _ in settings}) == 1:
        return {setting: VARIANT_LOOKS[i % len(VARIANT_LOOKS)] for i, setting in enumerate(sorted(settings))}
    found: dict[Setting, Look] = {}
    for setting in settings:
        colour, marker, dash = look(setting[0])
        again = any(method == setting[0] for method, _ in found)
        found[setting] = (colour, marker, (0, (3, 2))) if again else (colour, marker, dash)
    return found


def stands_out(setting: Setting, looks: dict[Setting, Look]) -> bool:
    """RLKV is drawn thicker among other methods."""
    return setting[0] == "rlkv" and any(method != "rlkv" for method, _ in looks)


def shown_variant(scores: Scores, setting: Setting) -> str:
    """The variant, where the method has several."""
    return setting[1] if sum(method == setting[0] for method, _ in scores.settings) > 1 else ""


def top(scores: Scores) -> float:
    """Upper end of the accuracy axis, in %: the highest value or band, and some air."""
    highest = max((score.interval.high if score.interval else score.percent for score in scores), default=100)
    return min(102.0, 1.04 * max(highest, 5.0))


def draw(
    axes: Axes, scores: Scores, looks: dict[Setting, Look], by_bytes: bool
) -> list[tuple[float, float, str, str]]:
    """One panel; returns the ends of its lines (x, y, name, colour), for names beside them."""
    full = next((score for score in scores if score.method == "full"), None)
    unit, scale = byte_unit(full.kv_bytes or 1) if full else ("bytes", 1)
    ends = []
    if full:
        axes.axhline(full.percent, color="black", linestyle="--", linewidth=0.9, zorder=1.5)
        if full.interval:
            axes.axhspan(full.interval.low, full.interval.high, color="black", alpha=0.05, linewidth=0)
    for setting, (colour, marker, dash) in looks.items():
        method, variant = setting
        points = [score for score in scores if (score.method, score.variant) == setting]
        if not points:
            continue
        placed = [(place(s, full, scale, by_bytes), s) for s in [*([full] if full else []), *points]]
        line = sorted(
            ((x, s) for x, s in placed if x is not None), key=lambda pair: (pair[0], pair[1].sparsity)
        )
        x, values = [x for x, _ in line], [score.percent for _, score in line]
        strong = stands_out(setting, looks)
        intervals = [score.interval for _, score in line if score.interval]
        if len(intervals) == len(line):
            widest = max(interval.high - interval.low for interval in intervals)
            # Wide bands of few problems cover everything: the wider, the fainter.
            faint = min(0.10, 1.2 / max(widest, 1.0)) * (2 if strong else 1)
            lows, highs = [i.low for i in intervals], [i.high for i in intervals]
            axes.fill_between(x, lows, highs, color=colour, alpha=faint, linewidth=0)
        marked = [index for index, (_, score) in enumerate(line) if score is not full]
        style: dict[str, Any] = {"linestyle": dash, "color": colour, "marker": marker, "markeredgewidth": 0.8}
        style |= {"linewidth": 1.9, "markersize": 4} if strong else {"linewidth": 1.1, "markersize": 3.2}
        axes.plot(x, values, markevery=marked, clip_on=False, zorder=3 if strong else 2.5, **style)
        ends.append((x[-1], values[-1], method_title(method, shown_variant(scores, setting)), colour))
    if by_bytes:
        right = (full.kv_bytes or 0) / scale if full else None
        axes.set_xlim(0, right)
        axes.set_xlabel(f"KV of a request, {unit}")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        return ends
    axes.set_xlim(0, max((100 * s for s in scores.sparsities), default=100))
    ticks = [0.0, *(100 * sparsity for sparsity in scores.sparsities)]
    axes.set_xticks(ticks, thinned(ticks, 0.14 * ticks[-1]))
    return [*ends, (axes.get_xlim()[1], full.percent, "full cache", "#000000")] if full else ends


def thinned(ticks: list[float], gap: float) -> list[str]:
    """Labels of rising ticks, empty where they would stand closer than ``gap`` to the one before."""
    labels, last = [], float("-inf")
    for tick in ticks:
        shown = tick - last >= gap
        labels.append(f"{tick:g}" if shown else "")
        last = tick if shown else last
    return labels


def place(score: Score, full: Score | None, scale: int, by_bytes: bool) -> float | None:
    """Where a score stands on the x axis: sparsity in %, or KV held; None where bytes are not known.

    Bytes are the score's share of the full cache on its own answers, times the full cache's bytes: a method
    that rambles or stops early is not moved sideways.
    """
    if not by_bytes:
        return 100 * score.sparsity
    if full is None or full.kv_bytes is None:
        return None
    share = 1.0 if score is full else score.kv_share
    return None if share is None else share * full.kv_bytes / scale
