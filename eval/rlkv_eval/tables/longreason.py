"""LongReason: accuracy, answer length and error classes of every method at 64k tokens of context."""

from __future__ import annotations

from rlkv_eval.names import KINDS, method_title, task_title
from rlkv_eval.scores import Score, Scores
from rlkv_eval.tables.accuracy import cell
from rlkv_eval.tables.render import Cell, Table, mark_best, missing


def task_tables(scores: Scores, task: str, intervals: bool) -> list[Table]:
    """One table a model, for one task in detail."""
    part = scores.where(task=task)
    return [task_table(part.where(model=model), model, task, intervals) for model in part.models]


def task_table(scores: Scores, model: str, task: str, intervals: bool) -> Table:
    """A row for each (method, sparsity); accuracy bold where it is the best at its sparsity."""
    absent = missing(scores.published)
    kinds = [kind for kind in KINDS if any(kind in score.kinds for score in scores)] or ["wrong", "truncated"]
    order = [score for setting in scores.settings for score in by_sparsity(scores, setting)]
    full = scores.full(model, task)
    rows: list[list[Cell | str]] = []
    rules = []
    shown = [full, *order] if full else order
    for score, before in zip(shown, [None, *shown], strict=False):
        if before and (score.method, score.variant) != (before.method, before.variant):
            rules.append(len(rows))
        rivals = [other.percent for other in order if other.sparsity == score.sparsity]
        best = score is not full and mark_best([score.percent, *rivals])[0] and len(rivals) > 1
        name = method_title(score.method, score.variant)
        rows.append([name, f"{score.sparsity:g}", cell(score, absent, intervals, best, digits=2)])
        rows[-1] += [f"{score.tokens:.0f}" if score.tokens is not None else absent]
        rows[-1] += [f"{score.kinds.get(kind, 0.0):.2f}" if score.kinds else absent for kind in kinds]
    problems = next((score.problems for score in scores if score.problems), None)
    return Table(
        title=f"{task_title(task)}, {model}",
        columns=["method", "sp", "accuracy", "mean output tokens", *(KINDS[kind] for kind in kinds)],
        rows=rows,
        notes=[f"Accuracy and error classes in % of {problems} answers. {absent}: no file was published."],
        rules=rules,
        label=f"{task}-{model.lower()}",
    )


def by_sparsity(scores: Scores, setting: tuple[str, str]) -> list[Score]:
    found = [score for score in scores if (score.method, score.variant) == setting]
    return sorted(found, key=lambda score: score.sparsity)
