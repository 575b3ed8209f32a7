"""Verdicts on answers: 1 if the final answer is right, else 0, and why.

The answer is read after the end of thinking; what a model boxed inside an unfinished thought does not count.
A reward is any function ``(text, problem) -> Verdict`` (or a plain number); name your own as
``module.path:function``. ``text`` starts with ``<think>`` where the prompt had opened a thought. Truncated
text is scored 0 without asking, unless the function has the attribute ``grades_truncated = True``.
"""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Any

from rlkv.data import Problem
from rlkv.errors import RLKVError

KINDS = ("correct", "wrong", "truncated", "no_answer", "error")
THINK, END_THINK = "<think>", "</think>"
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?", re.ASCII)


@dataclass(frozen=True)
class Verdict:
    """``score`` in [0, 1]; ``kind`` is one of KINDS ("error": the grader failed or ran out of time)."""

    score: float
    kind: str


Reward = Callable[[str, Problem], Verdict | float]


def after_thinking(text: str) -> str | None:
    """The text after the last ``</think>``; None when a thought was opened and never ended."""
    _, end, answer = text.rpartition(END_THINK)
    if end:
        return answer
    return None if THINK in text else text


def last_boxed(text: str) -> str | None:
    """What stands in the last complete ``\\boxed{...}``, braces matched; None without one."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth, begin = 1, start + len("\\boxed{")
        for index in range(begin, len(text)):
            escaped = text[index - 1] == "\\"
            depth += {"{": 1, "}": -1}.get(text[index], 0) * (not escaped)
            if depth == 0:
                return text[begin:index].strip()
        start = text.rfind("\\boxed{", 0, start)
    return None


def boxed_answer(text: str) -> str | None:
    """The last boxed answer after the end of thinking, or None."""
    answer = after_thinking(text)
    return None if answer is None else last_boxed(answer)


def exact(text: str, problem: Problem) -> Verdict:
    """Right if the boxed answer equals ``problem.answer`` character for character."""
    answer = boxed_answer(text)
    if answer is None:
        return Verdict(0.0, "no_answer")
    return _right(answer == problem.answer.strip())


def math(text: str, problem: Problem) -> Verdict:
    """Right if math-verify finds the boxed answer equal to the gold answer; both are read as LaTeX."""
    answer = boxed_answer(text)
    if answer is None:
        return Verdict(0.0, "no_answer")
    gold = last_boxed(problem.answer) or problem.answer.strip().strip("$").strip()
    if answer == gold or _same_number(gold, answer):
        return _right(True)
    from math_verify import verify
    from math_verify.errors import TimeoutException

    try:
        sides = _parse(gold), _parse(answer)
        return _right(bool(verify(*sides, timeout_seconds=_timeout(), raise_on_error=True)))
    except (Exception, TimeoutException):  # sympy fails in many ways on strange input; the count is reported
        return Verdict(0.0, "error")


def _same_number(gold: str, answer: str) -> bool:
    """Whether both are plain numbers of one value; math-verify can't read ``7.`` and ``1e3``."""
    plain = NUMBER.fullmatch(gold) and NUMBER.fullmatch(answer)
    return bool(plain) and Decimal(gold) == Decimal(answer)


def _right(equal: bool) -> Verdict:
    return Verdict(1.0, "correct") if equal else Verdict(0.0, "wrong")


def _timeout() -> int | None:
    """math-verify's limit in seconds; it works by signals, which only the main thread may set."""
    return 5 if threading.current_thread() is threading.main_thread() else None


@lru_cache(maxsize=16384)
def _parse(latex: str) -> list[Any]:
    """The whole of ``latex`` as one expression (never only its last number)."""
    from math_verify import parse

    return parse(f"\\boxed{{{latex}}}", parsing_timeout=_timeout(), raise_on_error=True)


def get_reward(name: str) -> Reward:
    """The reward named so; RLKVError if it, or a package that it needs, is missing."""
    if name == "exact":
        return exact
    if name == "math":
        try:
            importlib.import_module("math_verify")
        except Exception as error:  # of what it builds on, too, which raises many types
            raise RLKVError(
                f"reward math: math-verify does not import ({error}); "
                "run `pip install 'math-verify[antlr4_13_2]'`"
            ) from None
        return math
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise RLKVError(f"reward: expected exact, math or module.path:function, got {name!r}")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise RLKVError(f"reward {name}: cannot import {module_name}: {error}") from None
    except AttributeError:
        raise RLKVError(f"reward {name}: {module_name} has no {attribute!r}") from None
    if not callable(function):
        raise RLKVError(f"reward {name}: {attribute} is not a function")
    return function


def grade(reward: Reward, text: str, problem: Problem, finish: str) -> Verdict:
    """The verdict on one completion; ``finish`` is "stop" or "length" (cut off: truncated, score 0)."""
    if finish == "length" and not getattr(reward, "grades_truncated", False):
        return Verdict(0.0, "truncated")
    verdict: Any = reward(text, problem)
    if isinstance(verdict, int | float):
        verdict = Verdict(float(verdict), "correct" if verdict >= 1 else "wrong")
    if not isinstance(verdict, Verdict) or not 0.0 <= verdict.score <= 1.0:
        raise RLKVError(
            f"reward on problem {problem.id}: expected a Verdict or a number in [0, 1], got {verdict!r}"
        )
    return verdict
