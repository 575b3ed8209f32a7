"""Verdicts on completions: one of KINDS, with the rule that found the answer and the reason, always.

    verdict = grade(task.grader, item, text, finished)

A completion cut off by the length limit is never graded: it is ``repetition`` if its end loops, else
``truncated``. A grader that fails or runs out of time says ``grader_error``; it never raises. What a grader
needs is checked by ``preflight`` before anything is generated.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rlkv.errors import RLKVError
from rlkv_eval.graders.repetition import find_loop
from rlkv_eval.tasks.base import GRADERS, Item

KINDS = ("correct", "wrong", "truncated", "repetition", "no_answer", "grader_error")


@dataclass(frozen=True)
class Verdict:
    """What a grader says of one completion.

    ``score`` is 1 for correct, else 0. ``extracted`` is the answer as it was read, None without one. ``rule``
    names what found it ("boxed", "whole text: boxed", ...), ``reason`` is one sentence for a human.
    """

    kind: str
    score: float
    extracted: str | None
    rule: str
    reason: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no verdict {self.kind!r}; there are {', '.join(KINDS)}")


def right(extracted: str, rule: str, reason: str) -> Verdict:
    return Verdict("correct", 1.0, extracted, rule, reason)


def wrong(extracted: str, rule: str, reason: str) -> Verdict:
    return Verdict("wrong", 0.0, extracted, rule, reason)


def no_answer(reason: str) -> Verdict:
    return Verdict("no_answer", 0.0, None, "none", reason)


def grader_error(extracted: str | None, rule: str, reason: str) -> Verdict:
    return Verdict("grader_error", 0.0, extracted, rule, reason)


def grade(grader: str, item: Item, text: str, finished: bool) -> Verdict:
    """The verdict on one completion; callable from any thread.

    ``text`` is the completion as decoded, with ``</think>`` kept and the end-of-sequence token dropped.
    ``finished`` is False when the length limit cut it off. Raises RLKVError for an unknown grader only.
    """
    function = _function(grader, "grade")
    if not finished:
        loop = find_loop(text)
        if loop is None:
            return Verdict("truncated", 0.0, None, "length limit", "the length limit cut the completion off")
        return Verdict("repetition", 0.0, None, "length limit", f"cut off while repeating itself: {loop}")
    try:
        verdict: Verdict = function(item, text, finished)
    except Exception as error:  # a run of days must not end for one strange completion; errors are counted
        return grader_error(None, "none", f"the grader failed: {type(error).__name__}: {str(error)[:200]}")
    if verdict.kind == "no_answer" and (loop := find_loop(text)) is not None:
        return Verdict("repetition", 0.0, None, verdict.rule, f"no answer, and it ends in repeating: {loop}")
    return verdict


def preflight(graders: Iterable[str]) -> None:
    """Raise RLKVError, in one sentence, if a grader cannot work here (dependency missing, too old or new)."""
    for grader in dict.fromkeys(graders):
        _function(grader, "preflight")()


def grader_versions(grader: str) -> dict[str, str]:
    """Versions of the packages that a grader's verdicts depend on; none for one that stands alone."""
    if grader != "math":
        return {}
    from rlkv_eval.graders.math import versions

    return versions()


def _function(grader: str, what: str) -> Callable[..., Any]:
    if grader not in GRADERS:
        raise RLKVError(f"no grader {grader!r}; there are {', '.join(GRADERS)}")
    module = importlib.import_module(f"rlkv_eval.graders.{grader}")
    function: Callable[..., Any] = getattr(module, f"{what}_{grader}")
    return function
