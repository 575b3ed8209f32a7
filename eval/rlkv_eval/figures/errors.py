"""Why answers fail, against sparsity: stacked bars of the error classes, a panel a method."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from rlkv_eval.figures.style import KIND_COLOURS, MUTED, panels
from rlkv_eval.names import KINDS, method_title, task_title
from rlkv_eval.scores import Score, Scores


def error_bars(scores: Scores, model: str) -> Figure | None:
    """A row for each task, a column for each method; None when no error classes are known."""
    known = Scores(tuple(s for s in scores if s.model == model and s.kinds), scores.published)
    methods = known.settings
    if not methods:
        return None
    alone = len(methods) == 1
    figure, axes = panels(
        len(known.tasks), len(methods), 3.0 if alone else 1.55, 2.2 if alone else 1.6, sharey=True
    )
    for i, task in enumerate(known.tasks):
        for j, (method, variant) in enumerate(methods):
            bars = [
                score
                for score in known
                if score.task == task
                and (score.method == "full" or (score.method, score.variant) == (method, variant))
                and (score.method == "full" or score.sparsity > 0)  # 0 is the full cache
            ]
            draw(axes[i][j], sorted(bars, key=lambda score: score.sparsity))
            if i == 0:
                axes[i][j].set_title(method_title(method, variant))
        axes[i][0].set_ylabel(f"{task_title(task)}\nanswers, %")
    figure.supxlabel("sparsity, % (0: full cache)", fontsize=8)
    kinds = [kind for kind in KINDS if any(score.kinds.get(kind) for score in known)]
    patches = [Patch(color=KIND_COLOURS[kind], label=KINDS[kind]) for kind in kinds]
    figure.legend(
        handles=patches,
        loc="outside upper center",
        ncols=len(patches),
        handlelength=1,
        handleheight=1,
        fontsize=8,
    )
    return figure


def draw(axes: Axes, bars: list[Score]) -> None:
    """One stacked bar a sparsity, its total above it; the full cache stands at the left."""
    axes.grid(visible=False, axis="x")
    for place, score in enumerate(bars):
        bottom = 0.0
        for kind in KINDS:
            share = score.kinds.get(kind, 0.0)
            axes.bar(place, share, 0.72, bottom, color=KIND_COLOURS[kind], linewidth=0.6, edgecolor="white")
            bottom += share
        axes.text(place, bottom + 1.5, f"{bottom:.0f}", ha="center", va="bottom", fontsize=7, color=MUTED)
    axes.set_xticks(range(len(bars)), [f"{100 * score.sparsity:g}" for score in bars])
    axes.tick_params(axis="x", length=0, labelsize=7)
    axes.set_ylim(0, 109)
    axes.set_yticks([0, 25, 50, 75, 100])
