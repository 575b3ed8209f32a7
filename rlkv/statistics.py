"""Intervals and paired tests for accuracies over a set of problems. Intervals are 95 % by default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, inf, lgamma, pi, sqrt
from statistics import NormalDist

import numpy as np

from rlkv.errors import RLKVError


@dataclass(frozen=True)
class Estimate:
    """A value with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """Two methods on the same problems: ``second - first``, the flips both ways, and McNemar's exact p."""

    difference: Estimate
    lost: int  # right with the first, wrong with the second
    gained: int
    p_value: float


def z_value(confidence: float) -> float:
    """Two-sided normal quantile: 1.96 for 0.95."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def wilson(successes: int, total: int, confidence: float = 0.95) -> Estimate:
    """A proportion with Wilson's score interval (1927), which stays in [0, 1] and is honest near its ends."""
    if not 0 <= successes <= total or total == 0:
        raise RLKVError(
            f"a proportion needs 0 <= successes <= total and total > 0, got {successes} of {total}"
        )
    z2 = z_value(confidence) ** 2
    share = successes / total
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = sqrt(z2 * (share * (1 - share) / total + z2 / (4 * total**2))) / (1 + z2 / total)
    # The ends are exactly 0 and 1 at no and all successes; rounding would miss them by 1e-17.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == total else centre + half
    return Estimate(share, low, high)


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p that flips go either way with equal chance (binomial, p = 1/2)."""
    flips, fewer = lost + gained, min(lost, gained)
    tail = sum(comb(flips, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**flips)


def compare(first: Sequence[bool], second: Sequence[bool], confidence: float = 0.95) -> Paired:
    """Two methods' verdicts on the same problems, in the same order.

    The interval is Bonett and Price's (2012): Wald with one flip added each way, near its nominal coverage
    even when there are few flips or none.
    """
    if len(first) != len(second) or not first:
        raise RLKVError(
            f"a paired comparison needs the same problems twice, got {len(first)} and {len(second)}"
        )
    total = len(first)
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    share_lost, share_gained = (lost + 1) / (total + 2), (gained + 1) / (total + 2)
    centre = share_gained - share_lost
    half = z_value(confidence) * sqrt((share_gained + share_lost - centre**2) / (total + 2))
    low, high = max(-1.0, centre - half), min(1.0, centre + half)
    return Paired(Estimate((gained - lost) / total, low, high), lost, gained, mcnemar(lost, gained))


def crossed_mean(table: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Mean of ``table`` [masks, problems], with an interval for new masks AND new problems.

    Two crossed random effects: var(mean) = (MS_masks + MS_problems - MS_rest) / (masks * problems), with
    Satterthwaite's degrees of freedom. With a single mask only the problems' spread can be seen; with a
    single problem nothing can, and the interval is infinite.
    """
    table = np.asarray(table, dtype=np.float64)
    masks, problems = table.shape
    mean = float(table.mean())
    if problems < 2:
        return Estimate(mean, -inf, inf)
    if masks == 1:
        variance, freedom = float(table.var(ddof=1)) / problems, float(problems - 1)
    else:
        rows, columns = table.mean(1), table.mean(0)
        rest = table - rows[:, None] - columns[None, :] + mean
        rest_freedom = (masks - 1) * (problems - 1)
        ms_masks = problems * float(rows.var(ddof=1))
        ms_problems = masks * float(columns.var(ddof=1))
        ms_rest = float((rest**2).sum()) / rest_freedom
        parts = ((ms_masks, masks - 1), (ms_problems, problems - 1), (-ms_rest, rest_freedom))
        # The estimate may come out below what either effect alone gives, by chance: it never should.
        total = max(sum(part for part, _ in parts), ms_masks, ms_problems)
        variance = total / (masks * problems)
        spread = sum(part**2 / degrees for part, degrees in parts)
        freedom = max(1.0, total**2 / spread) if spread > 0 else 1.0
    half = t_value(freedom, confidence) * sqrt(variance) if variance > 0 else 0.0
    return Estimate(mean, mean - half, mean + half)


def t_value(freedom: float, confidence: float = 0.95) -> float:
    """Two-sided quantile of Student's t: 12.71 for 1 degree of freedom, 3.18 for 3, 1.96 for very many."""
    scale = np.exp(lgamma((freedom + 1) / 2) - lgamma(freedom / 2)) / sqrt(freedom * pi)
    # With x = sqrt(freedom) tan(angle) the density becomes a power of a cosine on a finite range.
    angles = np.linspace(0, pi / 2, 200_001)
    density = scale * sqrt(freedom) * np.maximum(np.cos(angles), 0) ** (freedom - 1)
    inside = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(angles))]) * 2
    return float(sqrt(freedom) * np.tan(np.interp(confidence, inside, angles)))
