"""Intervals and tests against independent definitions and simulation."""

from __future__ import annotations

from itertools import product
from math import sqrt

import numpy as np
import pytest

from rlkv.errors import RLKVError
from rlkv.statistics import compare, crossed_mean, mcnemar, t_value, wilson


def score_test_ends(successes: int, total: int) -> tuple[float, float]:
    """The shares that a two-sided score test at 5 % does not refuse, found by scanning."""
    share = successes / total
    grid = np.linspace(0, 1, 2_000_001)[1:-1]
    kept = grid[np.abs(share - grid) <= 1.959964 * np.sqrt(grid * (1 - grid) / total)]
    return float(kept[0]), float(kept[-1])


@pytest.mark.parametrize(("successes", "total"), [(0, 10), (1, 10), (10, 10), (97, 100), (512, 1024)])
def test_wilson_is_the_inverted_score_test(successes: int, total: int) -> None:
    found = wilson(successes, total)
    low, high = score_test_ends(successes, total)
    assert found.value == successes / total
    assert found.low == pytest.approx(low, abs=2e-6)
    assert found.high == pytest.approx(high, abs=2e-6)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_wilson_refuses_nonsense() -> None:
    for successes, total in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(RLKVError):
            wilson(successes, total)


@pytest.mark.parametrize("flips", range(8))
def test_mcnemar_is_the_share_of_coin_tosses_at_least_as_uneven(flips: int) -> None:
    for lost in range(flips + 1):
        tosses = [sum(toss) for toss in product((0, 1), repeat=flips)]
        uneven = abs(2 * lost - flips)
        share = sum(abs(2 * toss - flips) >= uneven for toss in tosses) / len(tosses)
        assert mcnemar(lost, flips - lost) == pytest.approx(share)


def test_compare_counts_flips_both_ways() -> None:
    first = [True, True, True, False, False]
    second = [True, False, False, True, False]
    found = compare(first, second)
    assert (found.lost, found.gained) == (2, 1)
    assert found.difference.value == pytest.approx(-0.2)
    back = compare(second, first)
    assert (back.lost, back.gained) == (1, 2)
    assert (back.difference.low, back.difference.high) == pytest.approx(
        (-found.difference.high, -found.difference.low)
    )


def test_compare_is_not_certain_without_flips() -> None:
    found = compare([True] * 50, [True] * 50).difference
    assert found.value == 0
    assert found.low < -0.01 and found.high > 0.01


def test_compare_refuses_different_problems() -> None:
    with pytest.raises(RLKVError, match="same problems"):
        compare([True], [True, False])


def test_compare_covers_the_truth() -> None:
    random = np.random.default_rng(0)
    truth = 0.95 * 0.9 + 0.05 * 0.3 - 0.95
    hits = 0
    for _ in range(1500):
        first = random.random(80) < 0.95
        second = random.random(80) < np.where(first, 0.9, 0.3)
        found = compare(list(first), list(second)).difference
        hits += found.low <= truth <= found.high
    assert 0.93 < hits / 1500 < 0.99


@pytest.mark.parametrize(
    ("freedom", "value"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (10, 2.22814), (30, 2.04227)]
)
def test_t_value_is_the_printed_table(freedom: float, value: float) -> None:
    assert t_value(freedom) == pytest.approx(value, rel=1e-4)


def test_one_mask_has_the_t_interval_of_a_mean() -> None:
    values = np.random.default_rng(1).random(12)
    found = crossed_mean(values[None])
    half = 2.200985 * values.std(ddof=1) / sqrt(12)  # t, 11 degrees of freedom
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), rel=1e-5)


def test_masks_that_agree_are_no_more_certain_than_one() -> None:
    values = np.random.default_rng(2).random(40)
    one, four = crossed_mean(values[None]), crossed_mean(np.tile(values, (4, 1)))
    assert four.high - four.low == pytest.approx(one.high - one.low, rel=1e-6)


@pytest.mark.parametrize(("masks", "problems"), [(0.3, 0.1), (0.02, 0.4), (0.15, 0.15)])
def test_crossed_mean_covers_new_masks_and_new_problems(masks: float, problems: float) -> None:
    random = np.random.default_rng(3)
    hits = 0
    for _ in range(1000):
        table = 0.4 + random.normal(0, masks, (4, 1)) + random.normal(0, problems, (1, 40))
        found = crossed_mean(table + random.normal(0, 0.3, (4, 40)))
        hits += found.low <= 0.4 <= found.high
    assert 0.925 < hits / 1000 <= 1


def test_nothing_varies_and_nothing_is_known() -> None:
    assert crossed_mean(np.zeros((3, 5))) == crossed_mean(np.zeros((1, 5)))
    single = crossed_mean(np.array([[1.0], [0.0]]))
    assert single.value == 0.5 and single.low == -np.inf and single.high == np.inf
