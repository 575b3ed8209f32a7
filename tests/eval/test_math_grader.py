"""The math grader against hand-made answers, local gold answers, and answers that would hang or crash it."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import math_suite as suite
import pytest

from rlkv.errors import RLKVError
from rlkv_eval.graders import KINDS, grade, preflight
from rlkv_eval.graders import math as math_grader
from rlkv_eval.graders import worker as worker_module
from rlkv_eval.graders.worker import Worker, WorkerError, ask
from rlkv_eval.tasks import Item, get_task

SHARED = Path(os.environ.get("RLKV_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data")
worker_module._worker.cpu_seconds = 2.0  # of each comparison: the hopeless ones should not take long here
PROMPT = "The last line is $\\boxed{ANSWER}$.\n\nWhat is it?"


def verdict(gold: str, text: str, finished: bool = True):
    return grade("math", Item("1", PROMPT, gold, "test"), text, finished)


def test_the_suite_is_as_large_as_promised():
    cases = [*suite.VALUES, *suite.PLACES]
    assert len(cases) >= 150 and len({case[:2] for case in cases}) == len(cases)
    assert {case[2] for case in cases} <= set(KINDS) and all(case[-1] for case in cases)


@pytest.mark.parametrize(("gold", "answer", "kind", "reason"), suite.VALUES)
def test_values(gold, answer, kind, reason):
    said = verdict(gold, suite.B(answer))
    assert said.kind == kind, f"{reason}: {said}"
    assert said.score == (kind == suite.OK) and said.reason and said.rule == "boxed"


@pytest.mark.parametrize(("gold", "text", "kind", "rule", "reason"), suite.PLACES)
def test_places(gold, text, kind, rule, reason):
    said = verdict(gold, text)
    assert (said.kind, said.rule) == (kind, rule), f"{reason}: {said}"


def test_a_cut_completion_is_truncated_even_with_the_right_box():
    assert verdict("5", suite.B("5"), finished=False).kind == "truncated"
    assert verdict("5", "hm " * 20, finished=False).score == 0


def test_a_whole_solution_as_gold():
    assert verdict("We see $x=2$, so $\\boxed{\\frac{1}{2}}$.", suite.B("0.5")).kind == "correct"
    assert verdict("3 + 4 = <<3+4=7>>7\n#### 7", suite.B("7")).kind == "correct"


def test_every_thread_may_grade():
    said = []
    threads = [
        threading.Thread(
            target=lambda n=n: said.append(verdict(f"{n}/7", suite.B(f"\\frac{{{n}}}{{7}}")).kind)
        )
        for n in range(1, 7)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == ["correct"] * 6


def test_out_of_time_and_out_of_memory_end_one_comparison_only():
    worker = Worker(cpu_seconds=1.0, memory_bytes=1 << 30)
    try:
        with pytest.raises(WorkerError, match="1 s of CPU|MiB|ended with"):
            worker.ask("compare", "3", "9^{9^{9^{9}}}")
        assert worker.ask("compare", "3", "6/2") == [True, "math-verify"]
        process = worker.process
        assert process is not None
        process.kill()
        process.wait()
        assert worker.ask("compare", "3", "6/2")[0]
    finally:
        worker.close()


@pytest.mark.parametrize(
    "text", ["\\boxed{" * 3000, "\\boxed{" + "\\frac{" * 900, "$" * 9999, "the answer is " * 5000]
)
def test_garbage_gets_a_verdict(text):
    assert verdict("5", "</think>" + text).kind in {"wrong", "no_answer", "repetition", "grader_error"}


def test_unicode_garbage_gets_a_verdict():
    assert verdict("5", "</think>\\boxed{\ud800\x00�}").kind in {"wrong", "grader_error"}


@pytest.mark.parametrize("name", ["gsm8k", "math500", "aime24", "aime25", "amc23"])
def test_every_gold_answer_grades_itself_correct(name):
    folder = SHARED / "benchmarks"
    if not folder.is_dir():
        pytest.skip(f"benchmarks not found: {folder} (set RLKV_SHARED_DATA)")
    for item in get_task(name).load(folder):
        said = grade("math", item, suite.B(item.answer), True)
        assert said.kind == "correct", (item.id, said)


def test_every_gold_answer_is_read_by_a_parser():
    """Not only equal as text: differently written answers must have something to be compared with."""
    folder = SHARED / "benchmarks"
    if not folder.is_dir():
        pytest.skip(f"benchmarks not found: {folder} (set RLKV_SHARED_DATA)")
    golds = {
        item.answer
        for name in ("gsm8k", "math500", "aime24", "amc23")
        for item in get_task(name).load(folder)
    }
    rows = json.loads((folder / "deepscaler" / "train_math.json").read_text())
    golds |= {row["answer"] for row in rows[::5] if row["answer"]}
    unread = sorted(gold for gold in golds if not ask("readable", gold))
    assert unread == []


def test_preflight_passes_here():
    preflight(["math", "choice", "exact", "math"])


def test_preflight_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(math_grader.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RLKVError, match="math-verify is missing; pip install"):
        preflight(["math"])


@pytest.mark.parametrize(
    ("package", "version", "says"),
    [
        ("math-verify", "0.5.2", "too old"),
        ("latex2sympy2_extended", "1.0.6", "needs latex2sympy2_extended"),
        ("latex2sympy2_extended", "", "here it is missing"),
        ("antlr4-python3-runtime", "", "antlr4-python3-runtime is missing"),
    ],
)
def test_preflight_names_a_mismatch(monkeypatch, package, version, says):
    real = math_grader._version
    monkeypatch.setattr(math_grader, "_version", lambda name: version if name == package else real(name))
    with pytest.raises(RLKVError, match=says):
        preflight(["math"])


def test_preflight_stops_when_the_comparison_says_no_to_everything(monkeypatch):
    monkeypatch.setattr(
        math_grader, "ask", lambda function, *_: function != "compare" or [False, "math-verify"]
    )
    with pytest.raises(RLKVError, match="differ"):
        preflight(["math"])


def test_unknown_grader_is_named():
    with pytest.raises(RLKVError, match="no grader 'maths'"):
        grade("maths", Item("1", "", "", ""), "", True)
