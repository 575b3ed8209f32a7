"""Statistics against simulation and against counting by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_kit import make_row

from rlkv.errors import RLKVError
from rlkv.statistics import Estimate, compare, wilson
from rlkv_eval.results import Results, Run
from rlkv_eval.statistics import (
    MARGIN,
    accuracy,
    against,
    bootstrap,
    decide,
    error_classes,
    frontier,
    noise_floor,
    problems_needed,
    score_table,
    summarise,
)


def make_run(table: Any, method: str = "full", sparsity: float = 0.0, seed: int = 0, name: str = "") -> Run:
    """``table``: scores [problems] or [problems, samples]."""
    scores = np.atleast_2d(np.asarray(table, dtype=float).T).T
    rows = [
        make_row(
            id=f"{problem}",
            sample=sample,
            method=method,
            sparsity=sparsity,
            seed=seed,
            score=float(score),
            kind="correct" if score == 1 else ("wrong", "truncated")[problem % 2],
        )
        for problem, row in enumerate(scores)
        for sample, score in enumerate(row)
    ]
    info = {"answers": len(rows), "true_sparsity": sparsity}
    return Run(
        Path(name or f"{method}-{sparsity}-{seed}"), "alpha", method, sparsity, seed, info, tuple(rows)
    )


def results(*runs: Run) -> Results:
    return Results(Path("x"), runs)


def test_one_sample_a_problem_gives_wilson_and_bonett_price() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random(200) < 0.8, rng.random(200) < 0.7
    full, other = make_run(first), make_run(second, "rlkv", 0.5)
    assert accuracy(full) == wilson(int(first.sum()), 200)
    found, expected = against(full, other), compare(list(map(bool, first)), list(map(bool, second)))
    assert found.difference == expected.difference
    assert (found.lost, found.gained, found.problems) == (expected.lost, expected.gained, 200)
    assert found.lost == int((first & ~second).sum()) and found.p_value == expected.p_value


def test_several_samples_resample_problems_not_answers() -> None:
    # Samples of a problem that always agree say no more than one of them.
    once = (np.arange(100) % 4 > 0).astype(float)
    single, alike = wilson(75, 100), accuracy(make_run(np.repeat(once[:, None], 8, 1)))
    assert alike.value == pytest.approx(0.75)
    assert alike.high - alike.low == pytest.approx(single.high - single.low, rel=0.1)
    rng = np.random.default_rng(0)
    free = accuracy(make_run(rng.random((100, 8)) < 0.75))
    assert free.high - free.low == pytest.approx(2 * 1.96 * math.sqrt(0.75 * 0.25 / 800), rel=0.25)


def test_the_bootstrap_covers() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        rates = rng.beta(2, 1, 80)  # mean 2/3
        found = bootstrap(rng.binomial(4, rates) / 4, resamples=1000, seed=seed)
        hits += found.low <= 2 / 3 <= found.high
    assert 178 <= hits <= 199  # 95 % of 200 is 190, four standard deviations are 12


def test_equal_runs_are_not_certain_to_be_equal() -> None:
    every = np.ones((50, 4))
    assert accuracy(make_run(every)) == wilson(50, 50)
    half = np.tile([1.0, 0.0], (50, 1))
    found = against(make_run(half), make_run(half, "rlkv", 0.5))
    expected = compare([True] * 50, [True] * 50).difference
    assert found.difference == expected and found.difference.low < 0 < found.difference.high
    assert (found.lost, found.gained, found.p_value) == (0, 0, 1.0)


def test_a_difference_in_hardly_any_problem_proves_no_more_than_none() -> None:
    full, better = np.ones((30, 4)), np.ones((30, 4))
    full[0, 0] = 0  # one sample gained, and the bootstrap's interval is [0, 2.5] points
    gained = against(make_run(full), make_run(better, "rlkv", 0.5))
    assert gained.difference.value == pytest.approx(1 / 120) and gained.verdict == "undecided"
    masks = [make_run(np.ones(30), "random", 0.5, seed) for seed in (0, 1)]
    assert against(make_run(np.ones(30)), masks).verdict == "undecided"
    # 30 problems cannot show that a method breaks on less than one in fifty; as many as the rule asks for can
    enough = problems_needed(0.0)
    first = np.ones((enough, 4))
    first[0, 0] = 0
    assert against(make_run(first), make_run(np.ones((enough, 4)), "rlkv", 0.5)).verdict == "near-lossless"
    masks = [make_run(np.ones(enough), "random", 0.5, seed) for seed in (0, 1)]
    assert against(make_run(np.ones(enough)), masks).verdict == "near-lossless"


def test_drawn_masks_are_compared_as_draws() -> None:
    rng = np.random.default_rng(2)
    full = make_run(np.ones(100))
    masks = [make_run(rng.random(100) < rate, "random", 0.5, seed) for seed, rate in enumerate((0.9, 0.1))]
    found = against(full, masks)
    assert found.difference.value == pytest.approx(np.mean([run.accuracy for run in masks]) - 1)
    assert found.difference.low == -1.0 and math.isnan(found.p_value)  # two masks say little about the next
    (_, summary) = summarise(results(full, *masks))
    assert (summary.runs, summary.problems, summary.samples) == (2, 100, 1)


def test_the_noise_floor_is_what_repeats_do() -> None:
    rng = np.random.default_rng(3)
    rates = rng.beta(0.5, 0.2, 400)
    gaps = [abs((rng.random(400) < rates).mean() - (rng.random(400) < rates).mean()) for _ in range(2000)]
    points = [
        noise_floor(make_run(rng.random(400) < rates), make_run(rng.random(400) < rates)).points
        for _ in range(10)
    ]
    assert np.mean(points) == pytest.approx(np.quantile(gaps, 0.95), rel=0.1)
    floor = noise_floor(make_run([1, 1, 0, 0]), make_run([1, 0, 1, 1]))
    assert floor.flips == 3 and floor.difference.value == 0.25
    assert floor.points == pytest.approx(1.96 * math.sqrt(3) / 4, rel=1e-3)


def test_the_rule_and_its_three_verdicts() -> None:
    assert MARGIN == 0.02
    assert decide(Estimate(0.0, -0.019, 0.01)) == "near-lossless"
    assert decide(Estimate(-0.01, -0.015, -0.005)) == "near-lossless"  # surely worse, by less than the margin
    assert decide(Estimate(0.0, -0.02, 0.02)) == "undecided"
    assert decide(Estimate(-0.05, -0.08, -0.021)) == "lossy"


def test_problems_needed_give_the_power_they_promise() -> None:
    flips, needed = 0.08, problems_needed(0.08)
    assert needed == 1570  # 0.08 * ((1.960 + 0.842) / 0.02) ** 2
    rng = np.random.default_rng(4)
    passed = 0
    for _ in range(400):
        kinds = rng.multinomial(needed, [flips / 2, flips / 2, 1 - flips])
        first = [True] * kinds[0] + [False] * kinds[1] + [True] * kinds[2]
        second = [False] * kinds[0] + [True] * kinds[1] + [True] * kinds[2]
        passed += decide(compare(first, second).difference) == "near-lossless"
    assert pytest.approx(passed / 400, abs=0.08) == 0.8


def test_without_a_flip_there_must_still_be_enough_problems() -> None:
    needed = problems_needed(0.0)
    assert needed == 138
    for count, verdict in ((needed, "near-lossless"), (needed - 2, "undecided")):
        assert decide(compare([True] * count, [True] * count).difference) == verdict


def test_the_frontier_stops_at_the_first_failure() -> None:
    full = make_run(np.ones(4000))
    good = np.ones(4000)
    bad = np.arange(4000) >= 400
    runs = [make_run(good, "rlkv", 0.2), make_run(bad, "rlkv", 0.4), make_run(good, "rlkv", 0.6)]
    assert frontier(results(full, *runs), "rlkv") == 0.2
    assert frontier(results(full, *runs[1:]), "rlkv") is None
    assert frontier(results(full, runs[0], runs[2]), "rlkv") == 0.6
    other = [replace(full, task="beta"), replace(runs[1], task="beta", sparsity=0.2)]
    assert frontier(results(full, *runs, *other), "rlkv") is None  # every task must pass
    assert frontier(results(full, *runs, *other), "rlkv", ["alpha"]) == 0.2


def test_error_classes_are_shares_of_all_answers() -> None:
    low = make_run([1, 1, 0, 1], "rlkv", 0.25)
    high = [make_run([0, 0, 0, 1], "rlkv", 0.5, seed) for seed in (0, 1)]
    assert error_classes([low, *high]) == {
        0.25: {"correct": 0.75, "wrong": 0.25},
        0.5: {"correct": 0.25, "truncated": 0.25, "wrong": 0.5},
    }


def test_other_problems_are_not_compared() -> None:
    with pytest.raises(RLKVError, match="different problems"):
        score_table([make_run([1, 0]), make_run([1, 0, 1])])
    with pytest.raises(RLKVError, match="no answers"):
        accuracy(replace(make_run([1]), rows=()))


def test_kv_share_of_the_summary() -> None:
    full, half = make_run([1, 1]), make_run([1, 0], "rlkv", 0.5)
    found = summarise(results(full, half))
    assert found[0].comparison is None and found[0].kv_share == 0.5  # the rows' bytes: 100 of 200
    assert found[1].comparison is not None and found[1].comparison.lost == 1
    blind = replace(half, rows=tuple(replace(row, kv_bytes=None) for row in half.rows))
    assert summarise(results(full, blind))[1].kv_share is None
