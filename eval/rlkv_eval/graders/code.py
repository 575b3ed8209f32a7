"""Programs: the last Python block of the answer, run against the asserts of its task in two sandboxes.

The code runs in one process; the asserts run in another, which asks the first to call the function under
test and compares what comes back. So exiting early, printing "passed", replacing ``assert``, ``==`` or a
builtin, or searching memory for the expected values gains nothing: they are not there.
"""

from __future__ import annotations

import json
import os
import re
import textwrap
from typing import Any

from rlkv.errors import RLKVError
from rlkv_eval import sandbox
from rlkv_eval.graders.base import Verdict, grader_error, no_answer, right, wrong
from rlkv_eval.graders.extract import END_THINK
from rlkv_eval.tasks.base import Item

LIMITS = sandbox.Limits(seconds=10)  # the authors' time limit (evaluator, execution.py)
FENCE = re.compile(r"^[ \t]*(?:```+|~~~+)[ \t]*([\w+-]*)[^\n`]*$", re.MULTILINE)
PYTHON = ("python", "py", "python3")


def preflight_code() -> None:
    """Raise RLKVError where a model's code cannot be contained; tried once a process."""
    sandbox.check()


def grade_code(item: Item, text: str, finished: bool) -> Verdict:
    """``item.extra``: tests (asserts), and optionally names (what the code defines), setup (run after it).

    Code that does not end in time, exits or raises is wrong, with that as the reason.
    """
    code, rule = find_code(text)
    if code is None:
        return no_answer("there is no Python block in the answer")
    kind, reason = run_tests(code, item.extra["tests"], item.extra.get("names"), item.extra.get("setup", ""))
    return {"correct": right, "wrong": wrong}.get(kind, grader_error)(code, rule, reason)


def find_code(text: str) -> tuple[str | None, str]:
    """(code, rule): the last block marked as Python after the end of thinking, else the last unmarked one.

    Where that part holds none, or nothing ends a thought, the whole text is read, and the rule says so. A
    block that the text ends in counts, closed or not. (None, "none") if there is no block.
    """
    answer = text.rpartition(END_THINK)[2]
    for where, part in (("", answer), ("whole text: ", text)) if answer != text else (("", text),):
        blocks = _blocks(part)
        for rule, languages in (("python block", PYTHON), ("unmarked block", ("",))):
            for language, code in reversed(blocks):
                if language in languages and code.strip():
                    return code, where + rule
    return None, "none"


def _blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks of a text. A marked fence opens a new one, come what may."""
    blocks: list[tuple[str, str]] = []
    opened: re.Match[str] | None = None
    for fence in [*FENCE.finditer(text), None]:
        if opened is not None:
            content = text[opened.end() + 1 : fence.start() if fence else len(text)]
            blocks.append((opened[1].lower(), textwrap.dedent(content)))
        opened = fence if fence and (opened is None or fence[1]) else None
    return blocks


def run_tests(
    code: str,
    tests: list[str],
    names: list[str] | None = None,
    setup: str = "",
    limits: sandbox.Limits | None = None,
    guards: tuple[str, ...] | None = None,
) -> tuple[str, str]:
    """("correct" | "wrong" | "unfit", reason) of a program under its asserts.

    ``names``: what the program is to define; other names of the tests are builtins and standard modules,
    and come from the program only if Python has none. Raises RLKVError where code cannot be contained.
    """
    limits = limits or LIMITS
    requests, replies, verdict = os.pipe(), os.pipe(), os.pipe()
    judge: dict[str, Any] = {"tests": tests, "names": names or [], "verdict": verdict[1]}
    judge |= {"requests": requests[1], "replies": replies[0]}
    candidate = {"code": code, "setup": setup, "requests": requests[0], "replies": replies[1]}
    jobs = [
        sandbox.Job(judge, "judge", (requests[1], replies[0], verdict[1])),
        sandbox.Job(candidate, "candidate", (requests[0], replies[1])),
    ]
    with os.fdopen(verdict[0], "rb") as said:
        judged, ran = sandbox.run_together(jobs, limits, guards)
        answer = said.read()
    if ran.kind == "disk":
        return "wrong", ran.reason
    if judged.kind == "timeout":
        return "wrong", f"the code did not end within {limits.seconds} s"
    if judged.kind != "ok" or not answer:
        raise RLKVError(f"code grader: the judge failed: {judged.reason}")
    kind, passed, reason = json.loads(answer)
    return kind, reason or f"all {passed} asserts hold"
