"""Loops at the end of a text, and the verdicts that follow from them."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkv_eval.graders import grade
from rlkv_eval.graders.repetition import MIN_CHARACTERS, MIN_COPIES, find_loop, periodic_end
from rlkv_eval.tasks import Item

ITEM = Item("1", "What?", "5", "test")
RNG = random.Random(0)
WORDS = ["".join(RNG.choices("abcdefghijklmnopqrstuvwxyz", k=RNG.randint(2, 9))) for _ in range(900)]
PROSE = " ".join(RNG.choices(WORDS, k=3000))


def slow_periodic_end(text: str) -> tuple[int, int]:
    """The definition, tried length by length and period by period."""
    best = (0, 0)
    for length in range(MIN_CHARACTERS, len(text) + 1):
        end = text[len(text) - length :]
        period = next(p for p in range(1, length + 1) if all(end[i] == end[i - p] for i in range(p, length)))
        if length >= MIN_COPIES * period:
            best = (length, period)
    return best


@settings(max_examples=25, deadline=None)
@given(st.text("ab", max_size=40), st.text("abc", min_size=1, max_size=90), st.integers(0, 60))
def test_periodic_end_is_its_definition(head, block, copies):
    text = (head + block * copies)[-260:]
    assert periodic_end(text) == slow_periodic_end(text)


@pytest.mark.parametrize("period", [1, 2, 7, 60, 400, 3000, 7000])
def test_loops_of_any_period(period):
    block = PROSE[:period]
    copies = max(4, MIN_CHARACTERS // period + 1)
    loop = find_loop(PROSE[5000:6000] + "\n" + block * copies + block[: period // 2])
    assert loop is not None and len(loop.block) == period


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "nothing"),
        (PROSE, "prose"),
        (PROSE[:2000] * 2, "twice is no loop"),
        ("Wait, let me check. " * 40 + PROSE[:500], "it got out of the loop"),
        ("x = 3, " * 10, "too short"),
        ("\n".join(f"{n} * {n} = {n * n}" for n in range(1, 300)), "a table of squares: all lines differ"),
        (
            "A:00+05=5:05;B:05+17=2:22;C:22-13=9:09;D:09+61=0:70;" + "E:70-33=7:37;F:37+25=2:62",
            "a pocket thought",
        ),
    ],
)
def test_no_loop(text, reason):
    assert find_loop(text) is None, reason


def test_few_words_are_a_loop_as_in_the_authors_rule():
    rng = random.Random(1)
    assert find_loop(" ".join(rng.choices(WORDS[:30], k=500))) is not None
    assert find_loop(" ".join(rng.choices(WORDS[:30], k=300))) is None


def test_verdicts():
    loop = "Wait, let me check. " * 40
    kinds = {
        "repetition": [(PROSE + loop, False), (PROSE + loop, True)],
        "truncated": [(PROSE, False), (f"{loop}</think>{PROSE[:300]}", False)],
        "correct": [(f"{loop}</think>\\boxed{{5}}", True)],
        "wrong": [(f"{loop}</think>\\boxed{{6}}", True)],
        "no_answer": [(PROSE, True)],
    }
    for kind, cases in kinds.items():
        for text, finished in cases:
            assert grade("math", ITEM, text, finished).kind == kind, (kind, text[-40:])


def test_a_long_text_is_quick():
    began = time.process_time()
    find_loop("ab" * 500_000)
    assert time.process_time() - began < 2  # it looks at the end only; a quadratic search takes hours
