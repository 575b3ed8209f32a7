"""The main table: accuracy against sparsity, every method, model and task; and who is best where."""

from __future__ import annotations

from rlkv_eval.names import REASONING, method_title, task_title
from rlkv_eval.scores import Score, Scores
from rlkv_eval.tables.render import Cell, Table, mark_best, missing

Setting = tuple[str, str]  # method, variant


def main_tables(scores: Scores, intervals: bool) -> list[Table]:
    """One table a model: a row for each (sparsity, method), a column for each task, best methods bold."""
    return [model_table(scores.where(model=model), model, scores.tasks, intervals) for model in scores.models]


def model_table(scores: Scores, model: str, tasks: list[str], intervals: bool) -> Table:
    """The table of one model. The mean is over the paper's four reasoning tasks, or over all."""
    averaged = [task for task in REASONING if task in tasks]
    averaged = averaged if len(averaged) == len(REASONING) else tasks
    absent = missing(scores.published)
    full = [scores.full(model, task) for task in tasks]
    rows: list[list[Cell | str]] = [["Full", "0", *(cell(score, absent, intervals) for score in full)]]
    rows[0].append(mean_text(scores, model, ("full", ""), 0.0, averaged, absent))
    rules = []
    for sparsity in scores.sparsities:
        settings = [pair for pair in scores.settings if has_row(scores, pair, sparsity)]
        found = {task: column(scores, model, task, settings, sparsity) for task in tasks}
        running = contenders(scores)
        best = {
            task: mark_best(
                [
                    s.percent if s and pair in running else None
                    for s, pair in zip(column, settings, strict=True)
                ]
            )
            for task, column in found.items()
        }
        rules.append(len(rows))
        for index, setting in enumerate(settings):
            cells = [cell(found[task][index], absent, intervals, best[task][index]) for task in tasks]
            mean = mean_text(scores, model, setting, sparsity, averaged, absent)
            rows.append([method_title(*setting), f"{sparsity:g}", *cells, mean])
    mean_head = f"mean of {len(averaged)} reasoning" if averaged != tasks else "mean"
    return Table(
        title=model,
        columns=["method", "sp", *map(task_title, tasks), mean_head],
        rows=rows,
        notes=notes(scores, tasks, intervals),
        left=1,
        rules=rules,
        label=f"main-{model.lower()}",
    )


def notes(scores: Scores, tasks: list[str], intervals: bool) -> list[str]:
    """What a reader must know of the numbers."""
    sizes = {task: next((s.problems for s in scores if s.task == task), None) for task in tasks}
    counts = ", ".join(f"{task_title(task)} {count}" for task, count in sizes.items() if count)
    lines = [f"Accuracy in %; bold: the best method at that sparsity. Problems: {counts}."]
    if intervals:
        lines.append("In brackets: 95 % intervals.")
    draws = max((score.draws for score in scores), default=1)
    if draws > 1:
        lines.append(f"Random heads: mean of {draws} draws.")
    absent = "no file was published" if scores.published else "not run"
    return [*lines, f"{missing(scores.published)}: {absent}."]


def has_row(scores: Scores, setting: Setting, sparsity: float) -> bool:
    """Whether this model has any score of the setting at this sparsity."""
    return any((s.method, s.variant, s.sparsity) == (*setting, sparsity) for s in scores)


def column(
    scores: Scores, model: str, task: str, settings: list[Setting], sparsity: float
) -> list[Score | None]:
    """The settings' scores on one task at one sparsity."""
    return [scores.get(model, task, method, sparsity, variant) for method, variant in settings]


def cell(score: Score | None, absent: str, intervals: bool, best: bool = False, digits: int = 1) -> Cell:
    """One decimal, as in the paper, with the interval where asked for and known."""
    if score is None:
        return Cell(absent)
    interval = score.interval
    small = f"({interval.low:.1f}–{interval.high:.1f})" if intervals and interval else ""
    return Cell(f"{score.percent:.{digits}f}", small, best)


def mean_text(
    scores: Scores, model: str, setting: Setting, sparsity: float, tasks: list[str], absent: str
) -> str:
    """Mean accuracy over ``tasks``; the mark of a missing cell unless all of them are there."""
    found = [scores.get(model, task, setting[0], sparsity, setting[1]) for task in tasks]
    values = [score.percent for score in found if score]
    return f"{sum(values) / len(values):.1f}" if values and len(values) == len(tasks) else absent


def contenders(scores: Scores) -> list[Setting]:
    """One variant of each method, that with most scores: methods compete, not their variants."""
    first: dict[str, Setting] = {}
    for setting in scores.settings:
        first.setdefault(setting[0], setting)
    return list(first.values())


def contest(scores: Scores, champion: str = "rlkv") -> tuple[Table, Table]:
    """Cells won by each method at each sparsity (ties count for each), and where ``champion`` is not best.

    Only cells with more than one method count.
    """
    settings = contenders(scores)
    wins = {sparsity: dict.fromkeys(settings, 0) for sparsity in scores.sparsities}
    losses: list[list[Cell | str]] = []
    for model in scores.models:
        for sparsity in scores.sparsities:
            for task in scores.tasks:
                found = column(scores, model, task, settings, sparsity)
                best = mark_best([score.percent if score else None for score in found])
                for setting, first in zip(settings, best, strict=True):
                    wins[sparsity][setting] += first
                mine = scores.get(model, task, champion, sparsity)
                top = next((score for score, first in zip(found, best, strict=True) if first), None)
                if mine and top and top.percent > mine.percent:
                    name = method_title(top.method)
                    row = [model, f"{sparsity:g}", task_title(task), name]
                    losses.append([*row, f"{top.percent:.1f}", f"{mine.percent:.1f}"])
    title = method_title(champion)
    won = Table(
        title="Cells won, ties counted for each",
        columns=["sp", *(method_title(method) for method, _ in settings)],
        rows=[[f"{s:g}", *(str(wins[s][pair]) for pair in settings)] for s in scores.sparsities],
        notes=[f"Cells: {len(scores.models)} models × {len(scores.tasks)} tasks at each sparsity."],
        label="cells-won",
    )
    lost = Table(
        title=f"Where {title} is not the best method",
        columns=["model", "sp", "task", "best method", "its accuracy", title],
        rows=losses,
        left=4,
        label="not-best",
    )
    return won, lost
