"""Mathematical answers: found by ``extract``, compared by ``equal`` in a process of its own."""

from __future__ import annotations

import importlib.util
import re
from importlib import metadata
from itertools import accumulate

from rlkv.errors import RLKVError
from rlkv_eval.graders.base import Verdict, grader_error, no_answer, right, wrong
from rlkv_eval.graders.extract import LONGEST, boxes_from_end, find_answer
from rlkv_eval.graders.worker import WorkerError, ask
from rlkv_eval.tasks.base import Item

DEEPEST = 50  # the parser needs seconds for a few hundred
OLDEST = (0, 8)
INSTALL = "pip install 'math-verify>=0.8'"
# What every installation must say: gold, answer, equal. A parser that does not work says False to all.
SELF_TEST = [
    (r"\frac{1}{2}", "0.5", True),
    (r"2\sqrt{5}", r"\sqrt{20}", True),
    ("[1,2)", r"[1,2)", True),
    ("x^2+2x+1", "(x+1)^2", True),
    ("7", "8", False),
]


def grade_math(item: Item, text: str, finished: bool) -> Verdict:
    """The verdict on a finished completion; ``item.answer`` is LaTeX, or a solution with the answer boxed."""
    found = find_answer(text, item.prompt)
    if found is None:
        return no_answer("no box, no statement of an answer and no number")
    if not found.text or len(found.text) > LONGEST:
        return wrong(found.text[:200], found.rule, f"an answer of {len(found.text)} characters")
    if depth(found.text) > DEEPEST:
        return wrong(
            found.text, found.rule, f"braces nested {depth(found.text)} deep: no answer that can be read"
        )
    gold = gold_answer(item.answer)
    try:
        equal, who = ask("compare", gold, found.text)
    except WorkerError as error:
        return grader_error(found.text, found.rule, f"comparing with {gold!r}: {error}")
    if equal:
        return right(found.text, found.rule, f"equal to {gold!r} ({who})")
    return wrong(found.text, found.rule, f"not equal to {gold!r} ({who})")


def depth(text: str) -> int:
    """How deep the braces of ``text`` are nested."""
    levels = accumulate((character == "{") - (character == "}") for character in text)
    return max(levels, default=0)


def gold_answer(answer: str) -> str:
    """The gold answer itself, where a whole solution is given: its last box, or what follows ####."""
    for box in boxes_from_end(answer):
        return box.content
    _, hashes, last = answer.rpartition("####")
    return last.strip() if hashes else answer.strip()


def preflight_math() -> None:
    """RLKVError unless math-verify and what it builds on are here, fit, and tell right from wrong."""
    _check_versions()
    for gold, answer, equal in SELF_TEST:
        try:
            said, who = ask("compare", gold, answer)
        except WorkerError as error:
            raise RLKVError(
                f"math grader: it cannot compare {gold} with {answer}: {error}; {INSTALL}"
            ) from None
        if said != equal:
            verb = "are equal" if said else "differ"
            raise RLKVError(f"math grader: {who} says that {gold} and {answer} {verb}; {INSTALL}")


def versions() -> dict[str, str]:
    """Versions of all that a verdict may depend on, for the record of a run."""
    names = ("math-verify", "latex2sympy2_extended", "latex2sympy2", "antlr4-python3-runtime", "sympy")
    return {name: version for name in names if (version := _version(name))}


def _check_versions() -> None:
    if importlib.util.find_spec("math_verify") is None:
        raise RLKVError(f"math grader: the package math-verify is missing; {INSTALL}")
    version = _version("math-verify")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
        raise RLKVError(f"math grader: math-verify {version} is too old; {INSTALL}")
    if not _version("antlr4-python3-runtime"):
        raise RLKVError(
            "math grader: antlr4-python3-runtime is missing; pip install 'math-verify[antlr4_13_2]'"
        )
    for requirement in metadata.requires("math-verify") or []:
        pinned = re.fullmatch(r"([\w.-]+)\s*\(?==\s*([\w.]+)\)?", requirement)  # no marker: always needed
        if pinned and _version(pinned[1]) != pinned[2]:
            have = _version(pinned[1]) or "missing"
            raise RLKVError(
                f"math grader: math-verify {version} needs {pinned[1]} {pinned[2]}, here it is {have}; "
                f"pip install '{pinned[1]}=={pinned[2]}'"
            )
    if importlib.util.find_spec("latex2sympy2") is not None and not ask("second_opinion_works"):
        raise RLKVError(
            f"math grader: latex2sympy2 {_version('latex2sympy2')} does not work with antlr4-python3-runtime "
            f"{_version('antlr4-python3-runtime')}; pip install 'antlr4-python3-runtime==4.9.3', or "
            "uninstall latex2sympy2, which is only a second opinion"
        )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
