"""Accuracies with intervals, paired comparisons with the full cache, the noise floor, the near-lossless rule.

Problems are the unit: with k samples a problem its score is the mean over them, and intervals come from
resampling problems. Intervals are 95 %. docs/evaluation.md gives the reasons for each choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from statistics import NormalDist
from typing import Literal

import numpy as np

from rlkv.errors import RLKVError
from rlkv.statistics import Estimate, compare, crossed_mean, mcnemar, wilson
from rlkv_eval.results import FULL, Results, Run

MARGIN = 0.02  # accuracy that a near-lossless method may lose: fixed before any result was seen
RESAMPLES = 10_000

Verdict = Literal["near-lossless", "undecided", "lossy"]


@dataclass(frozen=True)
class Comparison:
    """``second - first`` on the same problems; so many score lower (``lost``) and higher with the second.

    ``p_value``: exact McNemar (k = 1), or its extension to k samples, the sign test over problems.
    """

    difference: Estimate
    lost: int
    gained: int
    problems: int
    p_value: float

    @property
    def verdict(self) -> Verdict:
        """The near-lossless rule; see :func:`decide`."""
        return decide(self.difference)


@dataclass(frozen=True)
class NoiseFloor:
    """Two full-cache runs: what changes when nothing is compressed.

    ``points``: the difference of accuracies, in [0, 1], that two such runs stay within 95 % of the time.
    """

    difference: Estimate
    flips: int
    problems: int
    points: float


def bootstrap(values: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Mean of one value a problem, with the percentile interval over problems drawn anew (Efron 1979).

    Few or equal values show too little spread to draw from; callers handle that case.
    """
    data = np.asarray(values, dtype=np.float64)
    if not len(data):
        raise RLKVError("a mean needs at least one problem")
    generator = np.random.default_rng(seed)
    means = np.concatenate(
        [
            data[generator.integers(0, len(data), (part, len(data)))].mean(1)
            for part in np.diff(np.linspace(0, resamples, 51).astype(int))
        ]
    )
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(data.mean()), float(low), float(high))


def accuracy(runs: Run | Sequence[Run]) -> Estimate:
    """Accuracy of one run (Wilson; bootstrap over problems when k > 1), or of several drawn masks (crossed).

    Problems that all score the same fall back to Wilson on their number: no spread seen is not certainty.
    """
    runs = [runs] if isinstance(runs, Run) else list(runs)
    table = score_table(runs)
    if np.isin(table, (0, 1)).all() and (len(table) == 1 or np.ptp(table) == 0):
        return wilson(int(table[0].sum()), table.shape[1])
    return _within(crossed_mean(table) if len(table) > 1 else bootstrap(table[0]), 0.0)


def against(first: Run, second: Run | Sequence[Run]) -> Comparison:
    """Compare runs on the same problems, paired: ``first`` is the full cache, or any other run.

    One run each: Bonett-Price's interval (k = 1) or the bootstrap over problems (k > 1). Several drawn masks:
    the interval is for new masks and new problems, flips are the mean over masks, and p is not given (nan).
    The latter two are never narrower than Bonett-Price's for so many problems without a flip. RLKVError when
    the problems differ.
    """
    seconds = [second] if isinstance(second, Run) else list(second)
    table = score_table([first, *seconds])
    base, others = table[0], table[1:]
    lost, gained = int((others < base).sum()), int((others > base).sum())
    problems = table.shape[1]
    if len(others) > 1:
        spread = _no_narrower(crossed_mean(others - base), problems)
        count = len(others)
        return Comparison(spread, round(lost / count), round(gained / count), problems, float("nan"))
    if np.isin(table, (0, 1)).all():
        paired = compare([bool(value) for value in base], [bool(value) for value in others[0]])
        return Comparison(paired.difference, lost, gained, problems, paired.p_value)
    spread = _no_narrower(bootstrap(others[0] - base), problems)
    return Comparison(spread, lost, gained, problems, mcnemar(lost, gained))


def noise_floor(full: Run, repeat: Run) -> NoiseFloor:
    """From two full-cache runs. RLKVError when the problems differ.

    With flips in either direction equally likely, each problem's difference has the mean square v, and two
    runs' accuracies differ by a standard deviation of sqrt(v / n).
    """
    found = against(full, repeat)
    base, other = score_table([full, repeat])
    deviation = sqrt(float(((other - base) ** 2).mean()) / len(base))
    return NoiseFloor(found.difference, found.lost + found.gained, len(base), _z(0.975) * deviation)


def decide(difference: Estimate, margin: float = MARGIN) -> Verdict:
    """Non-inferiority: near-lossless if the interval of (method - full) lies above -margin, lossy if below.

    Anything else is undecided: more problems or samples are needed (:func:`problems_needed`).
    """
    if difference.low > -margin:
        return "near-lossless"
    return "lossy" if difference.high < -margin else "undecided"


def frontier(results: Results, method: str, tasks: Sequence[str] | None = None) -> float | None:
    """The largest sparsity up to which all tested are near-lossless on every task; None if not the first.

    Sparsities are tested in rising order and the first failure ends the search, so no correction for several
    tests is due (fixed-sequence testing; all tasks must pass, an intersection-union test).
    """
    tasks = results.tasks if tasks is None else tasks
    best = None
    for sparsity in sorted({run.sparsity for run in results.runs if run.method == method}):
        for task in tasks:
            full, runs = results.full(task), results.find(task, method, sparsity)
            if full is None or not runs or against(full, runs).verdict != "near-lossless":
                return best
        best = sparsity
    return best


def problems_needed(discordance: float, margin: float = MARGIN, power: float = 0.8) -> int:
    """Problems with which a method that loses nothing is shown near-lossless with this probability.

    ``discordance``: the fraction of problems that flip either way (lost + gained), such as the noise floor's.
    Without any flip, it takes as many as make Bonett and Price's interval narrow enough.
    """
    least = ceil(_z(0.975) * sqrt(2) / margin) - 1  # its half width without flips: z sqrt(2) / (n + 2)
    return max(least, ceil(discordance * ((_z(0.975) + _z(power)) / margin) ** 2))


def error_classes(runs: Sequence[Run]) -> dict[float, dict[str, float]]:
    """Requested sparsity -> share of answers of each kind, over all runs given at that sparsity."""
    found: dict[float, dict[str, float]] = {}
    for sparsity in sorted({run.sparsity for run in runs}):
        rows = [row for run in runs if run.sparsity == sparsity for row in run.rows]
        kinds = sorted({row.kind for row in rows})
        found[sparsity] = {kind: sum(row.kind == kind for row in rows) / len(rows) for kind in kinds}
    return found


def score_table(runs: Sequence[Run]) -> np.ndarray:
    """float64 [runs, problems] of mean scores over samples, the same problems in the same order in each."""
    first = runs[0]
    for run in runs:
        if not run.scores:
            raise RLKVError(f"{run.folder} holds no answers yet")
        if run.scores.keys() != first.scores.keys():
            raise RLKVError(
                f"{run.folder} and {first.folder} hold answers to different problems: finish both runs, with "
                "the same task and n"
            )
    return np.array([[float(np.mean(run.scores[problem])) for problem in first.scores] for run in runs])


def kv_share(runs: Sequence[Run]) -> float | None:
    """Bytes that requests held at their end, as a share of the full cache's for them; None if unknown."""
    rows = [row for run in runs for row in run.rows]
    if not rows or any(row.kv_bytes is None or not row.full_kv_bytes for row in rows):
        return None
    return sum(row.kv_bytes or 0 for row in rows) / sum(row.full_kv_bytes or 0 for row in rows)


@dataclass(frozen=True)
class Summary:
    """One method at one sparsity on one task; ``comparison`` is with the full cache (None for itself)."""

    task: str
    method: str
    sparsity: float
    true_sparsity: float
    runs: int
    problems: int
    samples: int
    accuracy: Estimate
    comparison: Comparison | None
    kinds: dict[str, float]
    new_tokens: float
    kv_share: float | None


def summarise(results: Results) -> list[Summary]:
    """One summary for each (task, method, sparsity), in the order of the runs; the repeat run is left out."""
    groups = dict.fromkeys((run.task, run.method, run.sparsity) for run in results.runs if not run.repeat)
    return [_summary(results, *group) for group in groups]


def _summary(results: Results, task: str, method: str, sparsity: float) -> Summary:
    runs = results.find(task, method, sparsity)
    rows = [row for run in runs for row in run.rows]
    full = results.full(task)
    return Summary(
        task=task,
        method=method,
        sparsity=sparsity,
        true_sparsity=float(np.mean([run.true_sparsity for run in runs])),
        runs=len(runs),
        problems=len(runs[0].scores),
        samples=len(runs[0].rows) // max(1, len(runs[0].scores)),
        accuracy=accuracy(runs),
        comparison=None if method == FULL or full is None else against(full, runs),
        kinds=error_classes(runs)[sparsity],
        new_tokens=float(np.mean([row.new_tokens for row in rows])),
        kv_share=kv_share(runs),
    )


def _no_narrower(found: Estimate, problems: int) -> Estimate:
    """The interval of a difference, at least as wide as of so many problems without a flip.

    Runs that differ in hardly any problem show hardly any spread, which is no proof that there is none: a
    method may break on problems of a kind that was not among these.
    """
    alike = compare([True] * problems, [True] * problems).difference
    low, high = min(found.low, found.value + alike.low), max(found.high, found.value + alike.high)
    return _within(Estimate(found.value, low, high), -1.0)


def _within(found: Estimate, lowest: float) -> Estimate:
    """The interval cut to [lowest, 1]."""
    return Estimate(found.value, max(lowest, found.low), min(1.0, found.high))


def _z(probability: float) -> float:
    return NormalDist().inv_cdf(probability)
