"""The reasoning-versus-instruct drop: does compression cost a reasoning model more than its instruct twin?"""

from __future__ import annotations

from collections.abc import Mapping

from rlkv_eval.names import method_title, task_title
from rlkv_eval.scores import Scores
from rlkv_eval.tables.accuracy import has_row
from rlkv_eval.tables.render import Table, missing

# The pairs of the paper, as the authors name them.
PAIRS = {
    "Llama-3.1-8B-R1": "Llama-3.1-8B-Inst",
    "Qwen-2.5-7B-R1": "Qwen-2.5-7B-Inst",
    "Qwen-3-4B-Thinking": "Qwen-3-4B-Instruct",
}


def drop_table(scores: Scores, pairs: Mapping[str, str]) -> Table:
    """Points lost to the full cache of the same model, a reasoning model's rows above its instruct twin's."""
    absent = missing(scores.published)
    rows: list[list[str]] = []
    rules = []
    for reasoning, instruct in pairs.items():
        if not {reasoning, instruct} & set(scores.models):
            continue
        for kind, model in (("reasoning", reasoning), ("instruct", instruct)):
            rules.append(len(rows))
            part = scores.where(model=model)
            places = [(*pair, s) for pair in part.settings for s in part.sparsities if has_row(part, pair, s)]
            if not places:
                rows.append([kind, model, "any", absent, *[absent] * len(scores.tasks)])
            for method, variant, sparsity in places:
                found = [drop(part, model, task, method, sparsity, variant) for task in scores.tasks]
                texts = [absent if points is None else f"{points:+.1f}" for points in found]
                rows.append([kind, model, method_title(method, variant), f"{sparsity:g}", *texts])
    return Table(
        title="Drop from the full cache: reasoning models and their instruct twins",
        columns=["kind", "model", "method", "sp", *map(task_title, scores.tasks)],
        rows=rows,
        notes=[f"Points against the full cache of the same model. {absent}: no results."],
        left=3,
        rules=rules,
        label="drop",
    )


def drop(scores: Scores, model: str, task: str, method: str, sparsity: float, variant: str) -> float | None:
    """Accuracy minus the full cache's, in points; None where either is not known."""
    score, full = scores.get(model, task, method, sparsity, variant), scores.full(model, task)
    return score.percent - full.percent if score and full else None
