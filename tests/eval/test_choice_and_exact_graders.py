"""Multiple choice and exact answers against hand-made completions."""

from __future__ import annotations

import choice_suite as suite
import pytest

from rlkv_eval.graders import grade, preflight
from rlkv_eval.tasks import Item

QUESTION = Item("1", f"Which?\n\n{suite.ECHO}", "C", "test", {"options": suite.OPTIONS})
POCKET = Item("1", "ledger A+05?", "07", "pocket")


@pytest.mark.parametrize(("text", "letter", "reason"), suite.CASES)
def test_choice(text, letter, reason):
    said = grade("choice", QUESTION, text, True)
    expected = "no_answer" if letter is None else "correct" if letter == "C" else "wrong"
    assert (said.extracted, said.kind) == (letter, expected), f"{reason}: {said}"


def test_the_options_texts_are_not_needed():
    item = Item("1", "Which?", "C", "longreason")
    assert grade("choice", item, "hm</think>C) Joy and peace", True).kind == "correct"
    assert grade("choice", item, "hm</think>Joy and peace", True).kind == "no_answer"


def test_the_fallback_is_recorded():
    assert grade("choice", QUESTION, "Answer: C", True).rule == "whole text: answer line"
    assert grade("choice", QUESTION, "Answer: C</think>", True).rule == "whole text: answer line"
    assert grade("choice", QUESTION, "hm</think>Answer: C", True).rule == "answer line"


@pytest.mark.parametrize(
    ("text", "kind", "extracted", "reason"),
    [
        ("A:0+5</think>\\boxed{07}", "correct", "07", "the pocket model's form"),
        ("A:0+5</think>\\boxed{ 07 }", "correct", "07", "spaces"),
        ("A:0+5</think>\\boxed{7}", "wrong", "7", "characters are compared, not numbers"),
        ("\\boxed{07}</think>\\boxed{08}", "wrong", "08", "the thought does not count"),
        ("\\boxed{07}", "correct", "07", "no thought"),
        ("A:0+5</think>07", "correct", "07", "no box: the last line"),
        ("A:0+5</think>\\boxed{07", "no_answer", None, "the box is not closed"),
        ("A:0+5</think>", "no_answer", None, "nothing"),
        ("", "no_answer", None, "nothing at all"),
    ],
)
def test_exact(text, kind, extracted, reason):
    said = grade("exact", POCKET, text, True)
    assert (said.kind, said.extracted) == (kind, extracted), f"{reason}: {said}"


def test_graders_without_dependencies_pass_preflight():
    preflight(["choice", "exact"])
