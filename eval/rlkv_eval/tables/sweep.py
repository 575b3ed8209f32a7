"""RLKV at several windows: accuracy and answer length, and how far each window can be taken."""

from __future__ import annotations

from rlkv_eval.names import task_title
from rlkv_eval.scores import Score, Scores
from rlkv_eval.tables.near_lossless import largest
from rlkv_eval.tables.render import Table, missing


def sweep_tables(scores: Scores) -> list[Table]:
    """One table a model: accuracy / mean output tokens for each window and sparsity."""
    return [sweep_table(scores, model) for model in scores.models]


def sweep_table(scores: Scores, model: str) -> Table:
    """All sparsities that any window was run at have a row; one without files says so."""
    absent = missing(scores.published)
    rows = [["full", "0.0", *(pair(scores.full(model, task), absent) for task in scores.tasks)]]
    rules = []
    for window in windows(scores):
        rules.append(len(rows))
        for sparsity in scores.sparsities:
            found = [scores.get(model, task, "rlkv", sparsity, window) for task in scores.tasks]
            rows.append([window, f"{sparsity:.1f}", *(pair(score, absent) for score in found)])
    return Table(
        title=model,
        columns=["window", "sp", *map(task_title, scores.tasks)],
        rows=rows,
        notes=[
            "Accuracy in % / mean output tokens; s16r64: 16 sink and 64 recent tokens.",
            f"{absent}: no file was published.",
        ],
        left=2,
        rules=rules,
        label=f"sweep-{model.lower()}",
    )


def pair(score: Score | None, absent: str) -> str:
    if score is None:
        return absent
    return f"{score.percent:.1f} / {score.tokens:.0f}" if score.tokens is not None else f"{score.percent:.1f}"


def frontier_table(scores: Scores, margin: float) -> Table:
    """The largest sparsity within ``margin`` points of the full cache, even if a smaller one fails."""
    rows = []
    for model in scores.models:
        for window in windows(scores):
            cells = []
            for task in scores.tasks:
                full = scores.full(model, task)
                best = largest(scores, model, task, ("rlkv", window), margin, every=False)
                same = full and best
                cells.append(
                    f"{best.sparsity:g} / {best.percent:.1f} (full {full.percent:.1f})"
                    if same and full and best
                    else "--"
                )
            rows.append([model, window, *cells])
    return Table(
        title=f"Largest sparsity within {margin:g} points of the full cache, by window",
        columns=["model", "window", *map(task_title, scores.tasks)],
        rows=rows,
        notes=["Sparsity / accuracy in %. The authors' rule: a smaller sparsity may fail. --: none passes."],
        left=2,
        rules=[index for index in range(len(rows)) if index and rows[index][0] != rows[index - 1][0]],
        label="frontier",
    )


def windows(scores: Scores) -> list[str]:
    """Windows that RLKV was run at, by their size."""
    return sorted({score.variant for score in scores if score.method == "rlkv"})
