"""Answers that must agree character for character: the pocket tasks, and any task with one right spelling.

The last ``\\boxed{...}`` after the end of thinking, or the last line there where nothing is boxed. The whole
text is the fallback, for boxes only, and the rule says so.
"""

from __future__ import annotations

from rlkv_eval.graders.base import Verdict, no_answer, right, wrong
from rlkv_eval.graders.extract import Found, boxes_from_end, final_part
from rlkv_eval.tasks.base import Item


def grade_exact(item: Item, text: str, finished: bool) -> Verdict:
    """Right if the answer is ``item.answer``, but for spaces around it."""
    found = find_exact(text)
    if found is None:
        return no_answer("no box, and nothing after the end of thinking")
    gold = item.answer.strip()
    if found.text == gold:
        return right(found.text, found.rule, f"it is {gold!r}")
    return wrong(found.text, found.rule, f"it should be {gold!r}")


def preflight_exact() -> None:
    """Nothing is needed."""


def find_exact(text: str) -> Found | None:
    """The answer as it stands, or None."""
    final = final_part(text)
    part = text if final is None else final
    where = "whole text: " if final is None else ""
    for box in boxes_from_end(part):
        if box.closed:
            return Found(box.content, where + "boxed")
    lines = [line.strip() for line in part.splitlines() if line.strip()]
    if lines and "\\boxed" not in part:
        return Found(lines[-1], where + "last line")
    if final:
        return None
    return next((Found(box.content, "whole text: boxed") for box in boxes_from_end(text) if box.closed), None)
