"""Is training worth it? RLKV against the best method that needs none, task by task."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from rlkv_eval.figures.style import panels
from rlkv_eval.names import TRAINING_FREE, method_title, task_title
from rlkv_eval.scores import Scores

BEHIND_AHEAD = LinearSegmentedColormap.from_list("behind-ahead", ["#D55E00", "#f7f7f7", "#0072B2"])
LIMIT = 20.0  # points at which the colours end

Gap = tuple[float, str]  # points ahead, the best training-free method


def against_best(scores: Scores, champion: str = "rlkv") -> Figure | None:
    """A map for each model, tasks down and sparsities across: points ahead of the best training-free method.

    Each cell says by how much, and of which method; the last row is the mean. None without any pair.
    """
    found = {model: gaps(scores.where(model=model), champion) for model in scores.models}
    found = {model: cells for model, cells in found.items() if cells}
    if not found:
        return None
    tasks = [
        task for task in scores.tasks if any(task == key[0] for cells in found.values() for key in cells)
    ]
    sparsities = sorted({key[1] for cells in found.values() for key in cells})
    width = max(
        0.56 * len(sparsities) + 0.4, 1.6, 3.8 / len(found)
    )  # names and colours beside few panels too
    figure, axes = panels(1, len(found), width, max(0.3 * (len(tasks) + 1) + 0.75, 1.8), sharey=True)
    for panel, (model, cells) in zip(axes[0], found.items(), strict=True):
        table = np.full((len(tasks) + 1, len(sparsities)), np.nan)
        for (task, sparsity), (points, rival) in cells.items():
            row, column = tasks.index(task), sparsities.index(sparsity)
            table[row, column] = points
            write(panel, column, row, points, method_title(rival))
        for column in range(len(sparsities)):
            known = table[:-1, column][~np.isnan(table[:-1, column])]
            if len(known):
                table[-1, column] = known.mean()
                write(panel, column, len(tasks), known.mean())
        image = panel.imshow(table, cmap=BEHIND_AHEAD, vmin=-LIMIT, vmax=LIMIT, aspect="auto")
        panel.axhline(len(tasks) - 0.5, color="white", linewidth=5)
        panel.set_title(model)
        panel.set_xticks(range(len(sparsities)), [f"{100 * sparsity:g}" for sparsity in sparsities])
        panel.set_yticks(range(len(tasks) + 1), [*map(task_title, tasks), "mean"])
        panel.set_xticks(np.arange(len(sparsities) - 1) + 0.5, minor=True)
        panel.set_yticks(np.arange(len(tasks)) + 0.5, minor=True)
        panel.grid(False)
        panel.grid(which="minor", color="white", linewidth=1)
        panel.tick_params(which="both", length=0)
        panel.spines[:].set_visible(False)
        panel.set_xlabel("sparsity, %")
    bar = figure.colorbar(
        image, ax=axes[0], shrink=0.75, aspect=18, pad=0.015, extend="both", ticks=[-20, -10, 0, 10, 20]
    )
    bar.ax.set_yticklabels(
        [f"{value:+d}".replace("-", "−").replace("+0", "0") for value in (-20, -10, 0, 10, 20)]
    )
    bar.set_label(f"{method_title(champion)} ahead by, points")
    bar.outline.set_visible(False)
    return figure


def write(axes, column: int, row: int, points: float, rival: str = "") -> None:
    """The number in a cell, and the rival's name under it."""
    colour = "white" if abs(points) > 0.62 * LIMIT else "#222222"
    text = f"{points:+.1f}".replace("-", "−")
    bold = "normal" if rival else "bold"
    height = -0.14 if rival else 0.0
    axes.text(column, row + height, text, ha="center", va="center", fontsize=7, color=colour, fontweight=bold)
    if rival:
        axes.text(column, row + 0.27, rival, ha="center", va="center", fontsize=4.8, color=colour)


def gaps(scores: Scores, champion: str) -> dict[tuple[str, float], Gap]:
    """(task, sparsity) -> how far ahead of which training-free method, wherever both have a score."""
    found = {}
    for mine in scores.where(method=champion):
        rivals = [
            score
            for score in scores
            if score.method in TRAINING_FREE and (score.task, score.sparsity) == (mine.task, mine.sparsity)
        ]
        if rivals:
            best = max(rivals, key=lambda score: score.percent)
            found[mine.task, mine.sparsity] = (mine.percent - best.percent, best.method)
    return found
