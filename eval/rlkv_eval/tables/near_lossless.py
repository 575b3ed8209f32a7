"""How many heads can be made local before accuracy falls: by one rule, and at the paper's own thresholds."""

from __future__ import annotations

from rlkv_eval.names import REASONING, method_title, task_title
from rlkv_eval.scores import Score, Scores
from rlkv_eval.statistics import decide
from rlkv_eval.tables.render import Cell, Table, mark_best, missing

Setting = tuple[str, str]  # method, variant

# The sparsities at which the paper calls each model near-lossless on a task, chosen task by task
# (arXiv 2510.08525, the near-lossless table).
PAPER_THRESHOLDS = {
    "Llama-3.1-8B-R1": {"gsm8k": 0.4, "math500": 0.5, "aime24": 0.4, "mbpp": 0.4},
    "Qwen-2.5-7B-R1": {"gsm8k": 0.4, "math500": 0.4, "aime24": 0.2, "mbpp": 0.3},
    "Qwen-3-4B-Thinking": {"gsm8k": 0.5, "math500": 0.5, "aime24": 0.5, "mbpp": 0.5},
}


def near_lossless_table(scores: Scores, margin: float) -> Table:
    """For each method and task, the largest sparsity that is near-lossless together with all smaller ones."""
    rows: list[list[Cell | str]] = []
    rules = []
    absent = missing(scores.published)
    for model in scores.models:
        rules.append(len(rows))
        part = scores.where(model=model)
        limits = [[limit(part, model, task, pair, margin) for task in scores.tasks] for pair in part.settings]
        best = [mark_best([found and found[0] for found in column]) for column in zip(*limits, strict=True)]
        for index, pair in enumerate(part.settings):
            row: list[Cell | str] = [model, method_title(*pair)]
            for found, first in zip(limits[index], best, strict=True):
                proven, possible = found or (0.0, 0.0)
                small = f"({possible:g})" if possible > proven else ""
                row.append(Cell(f"{proven:g}", small, first[index] and proven > 0) if found else absent)
            rows.append(row)
    if any(score.comparison for score in scores):
        rule = (
            "Near-lossless: the 95 % interval of the paired difference to the full cache lies above "
            f"−{margin:g} points, at this and every smaller sparsity that was run. In brackets: the largest "
            "up to which it never lies below that either, so that more problems could decide."
        )
    else:
        rule = (
            f"Near-lossless: at most {margin:g} points below the full cache, at this and every smaller "
            "sparsity that was run (the files hold no answers to pair)."
        )
    return Table(
        title="Largest near-lossless sparsity",
        columns=["model", "method", *map(task_title, scores.tasks)],
        rows=rows,
        notes=[f"{rule} 0: none. {absent}: no results."],
        left=2,
        rules=rules,
        label="near-lossless",
    )


def limit(
    scores: Scores, model: str, task: str, setting: Setting, margin: float
) -> tuple[float, float] | None:
    """The largest near-lossless sparsity and the largest not shown to be lossy, 0 for none of them.

    None if the setting, or the full cache, has no score on this task.
    """
    if scores.full(model, task) is None or not of_setting(scores, model, task, setting):
        return None
    proven = largest(scores, model, task, setting, margin)
    possible = largest(scores, model, task, setting, margin, ("near-lossless", "undecided"))
    return proven.sparsity if proven else 0.0, possible.sparsity if possible else 0.0


def largest(
    scores: Scores,
    model: str,
    task: str,
    setting: Setting,
    margin: float,
    verdicts: tuple[str, ...] = ("near-lossless",),
    every: bool = True,
) -> Score | None:
    """The score of the largest sparsity with one of ``verdicts``; with ``every`` all smaller ones too.

    Scores of our own that cannot be paired (the full cache is in another folder) are undecided.
    """
    full = scores.full(model, task)
    best = None
    for score in of_setting(scores, model, task, setting):
        paired = score.comparison is not None or scores.published
        if full and (verdict(score, full, margin) if paired else "undecided") in verdicts:
            best = score
        elif every:
            break
    return best


def of_setting(scores: Scores, model: str, task: str, setting: Setting) -> list[Score]:
    """The scores of a method's variant on a task, by sparsity."""
    found = [s for s in scores if (s.model, s.task, s.method, s.variant) == (model, task, *setting)]
    return sorted(found, key=lambda score: score.sparsity)


def verdict(score: Score, full: Score, margin: float) -> str:
    """Whether accuracy stays within ``margin`` points of the full cache: near-lossless, undecided or lossy.

    With answers to the same problems by the rule of ``statistics.decide``. Without them the difference itself
    decides, at most the margin being near-lossless.
    """
    if score.comparison is None:
        return "near-lossless" if score.percent >= full.percent - margin else "lossy"
    return decide(score.comparison.difference, margin / 100)


def threshold_table(scores: Scores) -> Table:
    """Every method at the paper's own threshold of each task: accuracy, and difference to the full cache."""
    absent = missing(scores.published)
    tasks = [task for task in REASONING if task in scores.tasks]
    rows: list[list[Cell | str]] = []
    rules = []
    for model in scores.models:
        if model not in PAPER_THRESHOLDS:
            continue
        rules.append(len(rows))
        chosen = PAPER_THRESHOLDS[model]
        rows.append([model, "threshold sp", *(f"{chosen[task]:g}" for task in tasks)])
        full = {task: scores.full(model, task) for task in tasks}
        rows.append([model, "Full", *(f"{s.percent:.1f}" if (s := full[task]) else absent for task in tasks)])
        for setting in scores.where(model=model).settings:
            cells = []
            for task in tasks:
                score = scores.get(model, task, setting[0], chosen[task], setting[1])
                cells.append(with_difference(score, full[task], absent))
            rows.append([model, method_title(*setting), *cells])
    return Table(
        title="At the paper's own near-lossless thresholds",
        columns=["model", "method", *map(task_title, tasks)],
        rows=rows,
        notes=[f"Accuracy in % (difference to the full cache). {absent}: no file was published."],
        left=2,
        rules=rules,
        label="thresholds",
    )


def with_difference(score: Score | None, full: Score | None, absent: str) -> str:
    if score is None:
        return absent
    return f"{score.percent:.1f} ({score.percent - full.percent:+.1f})" if full else f"{score.percent:.1f}"
