"""Measured speed-up against what the freed memory allows."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from rlkv_eval.figures.style import MUTED, label_lines, look, panels
from rlkv_eval.names import task_title
from rlkv_eval.published import Efficiency
from rlkv_eval.tables.efficiency import speed_bound


def speedups(runs: tuple[Efficiency, ...]) -> Figure | None:
    """A panel for each model and task: tokens/s and time against the full cache, and the bound."""
    places = dict.fromkeys((run.model, run.task) for run in runs if run.method == "full")
    if not places:
        return None
    figure, axes = panels(1, len(places), 3.4, 2.4)
    for panel, (model, task) in zip(axes[0], places, strict=True):
        group = [run for run in runs if (run.model, run.task) == (model, task)]
        full = next(run for run in group if run.method == "full")
        length = full.mean_output + full.input_tokens / full.problems
        x = np.linspace(0, max(run.sparsity for run in group), 200)
        bound = [speed_bound(s, full.window, length) for s in x]
        panel.plot(100 * x, bound, "--", color="black", linewidth=1)
        sparsities = [100 * run.sparsity for run in group]
        rates = [run.tokens_per_second / full.tokens_per_second for run in group]
        times = [full.seconds / run.seconds for run in group]
        panel.plot(sparsities, rates, "o-", color=look("rlkv")[0], clip_on=False)
        panel.plot(sparsities, times, "s-", color=look("rkv")[0], clip_on=False)
        panel.axhline(1, color=MUTED, linewidth=0.8)
        panel.set(
            xlim=(0, sparsities[-1]), ylim=(0, None), xlabel="sparsity, %", ylabel="times the full cache"
        )
        panel.set_title(f"{model}, {task_title(task)}, SGLang")
        ends = [
            (sparsities[-1], bound[-1], "memory bound", "#000000"),
            (sparsities[-1], rates[-1], "tokens/s", look("rlkv")[0]),
            (sparsities[-1], times[-1], "total time", look("rkv")[0]),
        ]
        label_lines(panel, ends)
    return figure
