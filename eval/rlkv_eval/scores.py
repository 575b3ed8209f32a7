"""What tables and figures are made of: one score a (model, task, method, sparsity), wherever it came from.

Scores are read from the authors' files (:mod:`rlkv_eval.published`) or made from our own rows here.
Percentages are in [0, 100].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rlkv.errors import RLKVError
from rlkv.statistics import Estimate
from rlkv_eval.names import TASKS, method_order

if TYPE_CHECKING:
    from rlkv_eval.results import Results
    from rlkv_eval.statistics import Comparison, Summary


@dataclass(frozen=True)
class Score:
    """Accuracy of one method on one task, in percent, with its 95 % interval where the sample size is known.

    ``variant`` tells settings of one method apart (another set of head scores, another window). ``kinds``:
    share of all answers in percent, by error class. ``kv_share``: bytes held, as a fraction of the full
    cache's for the same answers; ``kv_bytes``: their mean a request. ``verdicts``: problem -> mean score in
    [0, 1], where the rows are known.
    """

    model: str
    task: str
    method: str
    sparsity: float
    percent: float
    interval: Estimate | None = None
    problems: int | None = None
    variant: str = ""
    tokens: float | None = None  # mean length of an answer
    kinds: dict[str, float] = field(default_factory=dict)
    kv_share: float | None = None
    kv_bytes: float | None = None
    draws: int = 1  # random masks that the score is a mean of
    comparison: Comparison | None = None


@dataclass(frozen=True)
class Scores:
    """A list of scores with the look-ups that tables need; ``published`` says whose they are."""

    items: tuple[Score, ...]
    published: bool = False

    def __iter__(self) -> Iterator[Score]:
        return iter(self.items)

    def __bool__(self) -> bool:
        return bool(self.items)

    def where(self, **values: object) -> Scores:
        """Those whose fields equal ``values``."""
        kept = (item for item in self if all(getattr(item, key) == value for key, value in values.items()))
        return Scores(tuple(kept), self.published)

    def get(
        self, model: str, task: str, method: str, sparsity: float = 0.0, variant: str | None = None
    ) -> Score | None:
        """One score, or None; the full cache is asked for without a sparsity."""
        for item in self:
            if (item.model, item.task, item.method, item.sparsity) == (model, task, method, sparsity) and (
                variant is None or item.variant == variant
            ):
                return item
        return None

    def full(self, model: str, task: str) -> Score | None:
        """The full cache's score."""
        return self.get(model, task, "full")

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(item.model for item in self))

    @property
    def tasks(self) -> list[str]:
        """In the paper's order; unknown ones after it."""
        order = list(TASKS)
        found = dict.fromkeys(item.task for item in self)
        return sorted(found, key=lambda task: order.index(task) if task in order else len(order))

    @property
    def settings(self) -> list[tuple[str, str]]:
        """(method, variant) without the full cache, RLKV last; of variants, that with most scores first."""
        found = Counter((item.method, item.variant) for item in self if item.method != "full")
        return sorted(found, key=lambda pair: (method_order(pair[0]), -found[pair], pair[1]))

    @property
    def sparsities(self) -> list[float]:
        return sorted({item.sparsity for item in self if item.method != "full"})


def own_scores(results: Results) -> Scores:
    """Scores of one evaluation of our own: drawn masks of one method pooled, the repeat run left out."""
    from rlkv_eval.statistics import summarise

    model = model_name(results)
    return Scores(tuple(make_score(results, model, summary) for summary in summarise(results)))


def make_score(results: Results, model: str, summary: Summary) -> Score:
    """Of one summary; bytes are those that the requests held at their ends."""
    runs = results.find(summary.task, summary.method, summary.sparsity)
    rows = [row for run in runs for row in run.rows]
    held = [row.kv_bytes for row in rows if row.kv_bytes is not None]
    return Score(
        model,
        summary.task,
        summary.method,
        summary.sparsity,
        percent=100 * summary.accuracy.value,
        interval=in_percent(summary.accuracy),
        problems=summary.problems,
        tokens=summary.new_tokens,
        kinds={kind: 100 * share for kind, share in summary.kinds.items()},
        kv_share=summary.kv_share,
        kv_bytes=sum(held) / len(held) if len(held) == len(rows) else None,
        draws=summary.runs,
        comparison=summary.comparison,
    )


def in_percent(estimate: Estimate) -> Estimate:
    return Estimate(100 * estimate.value, 100 * estimate.low, 100 * estimate.high)


def model_name(results: Results) -> str:
    """The model's name in run.json, without the folders before it."""
    model = results.runs[0].info.get("model")
    name = model.get("name") if isinstance(model, dict) else model
    return Path(str(name or "model")).name


def join(parts: Iterable[Scores]) -> Scores:
    """Several evaluations as one. RLKVError when two of them evaluate the same thing."""
    items = [score for part in parts for score in part]
    seen = Counter((s.model, s.task, s.method, s.sparsity, s.variant) for s in items)
    twice = next((key for key, count in seen.items() if count > 1), None)
    if twice:
        model, task, method, sparsity, _ = twice
        raise RLKVError(
            f"two of the folders hold {method} at {sparsity:g} on {task} for {model}: give one of them"
        )
    return Scores(tuple(items))
