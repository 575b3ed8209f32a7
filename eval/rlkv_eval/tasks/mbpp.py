"""MBPP (arXiv 2108.07732): short Python programs, the 500 of the test split (task_id 11 to 510).

Of the authors' prompt it is known only that the instruction is part of it and that the last Python block is
run; the words below are ours. Task 367 tests trees (``root``) that only the data set's setup code makes:
where the rows come without it, as theirs do, no program passes it.
"""

from __future__ import annotations

import ast
import warnings
from pathlib import Path

from rlkv_eval.tasks.base import Item, Task
from rlkv_eval.tasks.sources import column, fill, read_rows

FILES = ("mbpp/mbpp_test.jsonl", "mbpp/test.jsonl", "mbpp.jsonl")
HUB: list[tuple[str, str | None, str]] = [
    ("Kurt232/MBPP", None, "test"),
    ("google-research-datasets/mbpp", "full", "test"),
]
PROMPT = (
    "Solve the following programming task in Python. Think step by step, then give the complete solution, "
    "with every import and helper that it needs, in one ```python code block.\n\n{problem}\n\nYour code must "
    "pass these tests:\n\n{tests}"
)


def load(data_dir: Path | None) -> list[Item]:
    items = []
    for row in read_rows(data_dir, "mbpp", FILES, HUB):
        tests = [str(test) for test in column(row, "mbpp", "test", "test_list")]
        problem = str(column(row, "mbpp", "prompt", "text"))
        number = str(column(row, "mbpp", "task_id"))
        extra = {
            "tests": tests,
            "names": defined_names(str(row.get("code") or "")),
            "setup": str(row.get("test_setup_code") or ""),
        }
        prompt = fill(PROMPT, problem=problem.strip(), tests="\n".join(tests))
        items.append(Item(f"mbpp-{number}", prompt, number, "mbpp", extra))
    return items


def defined_names(code: str) -> list[str]:
    """Functions, classes and variables that a program defines at its top; none for one that is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the data set's own making
            body = ast.parse(code).body
    except SyntaxError:
        return []
    names: list[str] = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return names


TASKS = (Task("mbpp", "MBPP", "code", 8192, load),)
