"""Verdicts: where the answer is read, what equals what, and that nothing becomes a silent zero."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest

from rlkv.data import Problem
from rlkv.errors import RLKVError
from rlkv.rewards import Verdict, after_thinking, exact, get_reward, grade, last_boxed, math


def problem(answer: str) -> Problem:
    return Problem("question", answer, "p1")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("<think>a</think>b", "b"),
        ("a</think>b", "b"),
        ("<think>a</think>b<think>c</think>d", "d"),
        ("<think>never ended", None),
    ],
)
def test_after_thinking(text: str, expected: str | None) -> None:
    assert after_thinking(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{42}", "42"),
        (r"\boxed{1} then \boxed{ 2 }", "2"),
        (r"$\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{7} and \boxed{8", "7"),
        ("nothing", None),
        (r"\boxed{", None),
    ],
)
def test_last_boxed(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


@pytest.mark.parametrize("reward", [exact, math])
@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (r"<think>so \boxed{42}", "no_answer"),  # boxed in a thought that never ended
        (r"<think>\boxed{42}</think>it is 42", "no_answer"),  # in the thought, not in the answer
        (r"<think>\boxed{41}</think>\boxed{42}", "correct"),
        (r"<think>\boxed{42}</think>\boxed{41}", "wrong"),
        (r"\boxed{42}", "correct"),
    ],
)
def test_where_the_answer_is_read(reward: Any, text: str, kind: str) -> None:
    verdict = reward(text, problem("42"))
    assert verdict == Verdict(float(kind == "correct"), kind)


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{2}", "2", False),  # a gold answer cut to its last number would take this
        (r"$\frac{1}{2}$", r"\dfrac12", True),
        (r"\boxed{\frac{1}{2}}", r"1/2", True),
        ("2x+1", "1", False),
        ("2x+1", "1+2x", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, 2)", False),
        (r"\text{Evelyn}", "Evelyn", True),
        (r"\text{Evelyn}", "Adam", False),
        ("1,000", "1000", True),
        (r"\{1,2\}", r"\{2,1\}", True),
        ("5", "50", False),
        ("7", "7.", True),
        ("7.", "7", True),
        ("7", "70.", False),
        ("1000", "1e3", True),
        ("1000", "+1.0E3", True),
        ("1000", "1e-3", False),
        ("0.0015", "1.5e-3", True),
        ("13", "1e3", False),
        ("1e3", "1e", False),
    ],
)
def test_math_reads_both_sides_as_latex(gold: str, answer: str, right: bool) -> None:
    assert math(rf"</think>\boxed{{{answer}}}", problem(gold)).kind == ("correct" if right else "wrong")


def test_math_off_the_main_thread() -> None:
    """math-verify's time limit works by signals, which a thread may not set."""
    verdicts: list[Verdict] = []
    thread = threading.Thread(target=lambda: verdicts.append(math(r"\boxed{3/6}", problem(r"\frac{4}{8}"))))
    thread.start()
    thread.join()
    assert verdicts == [Verdict(1.0, "correct")]


def test_a_failing_grader_is_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    import math_verify

    def fail(*args: Any, **options: Any) -> bool:
        raise RecursionError

    monkeypatch.setattr(math_verify, "verify", fail)
    assert math(r"\boxed{3}", problem("4")) == Verdict(0.0, "error")


def test_missing_grader_package_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grader itself, or what it imports."""
    for missing in ("math_verify", "antlr4"):
        with monkeypatch.context() as patch:
            for name in [*sys.modules]:
                if name.split(".")[0] in ("math_verify", "latex2sympy2_extended", "antlr4"):
                    patch.delitem(sys.modules, name)
            patch.setitem(sys.modules, missing, None)
            with pytest.raises(RLKVError, match=f"{missing}.*pip install 'math-verify"):
                get_reward("math")


def test_truncated_is_wrong_and_counted() -> None:
    assert grade(exact, r"</think>\boxed{42}", problem("42"), "length") == Verdict(0.0, "truncated")
    assert grade(exact, r"</think>\boxed{42}", problem("42"), "stop") == Verdict(1.0, "correct")


def half(text: str, problem: Problem) -> float:
    return 0.5


def too_much(text: str, problem: Problem) -> float:
    return 2.0


def test_plug_in() -> None:
    assert get_reward(f"{__name__}:half") is half
    assert grade(half, "", problem(""), "stop") == Verdict(0.5, "wrong")
    assert grade(half, "", problem(""), "length").kind == "truncated"
    with pytest.raises(RLKVError, match=r"problem p1.*\[0, 1\]"):
        grade(too_much, "", problem(""), "stop")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("maths", "exact, math or module.path:function, got 'maths'"),
        ("no.such.module:f", "cannot import no.such.module"),
        (f"{__name__}:nobody", "has no 'nobody'"),
        (f"{__name__}:__name__", "not a function"),
    ],
)
def test_bad_names(name: str, match: str) -> None:
    with pytest.raises(RLKVError, match=match):
        get_reward(name)
