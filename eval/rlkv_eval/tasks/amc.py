"""AMC 2023 (American Mathematics Competitions 12A and 12B): 40 problems with whole-number answers."""

from __future__ import annotations

from pathlib import Path

from rlkv_eval.tasks.base import Item, Task
from rlkv_eval.tasks.sources import MATH_PROMPT, column, fill, read_rows

FILES = ("amc23/test.jsonl", "amc23.jsonl")
HUB = [("math-ai/amc23", None, "test"), ("AI-MO/aimo-validation-amc", None, "train")]


def load(data_dir: Path | None) -> list[Item]:
    items = []
    for number, row in enumerate(read_rows(data_dir, "amc23", FILES, HUB)):
        prompt = fill(MATH_PROMPT, problem=str(column(row, "amc23", "problem", "question")))
        answer = column(row, "amc23", "answer")
        if isinstance(answer, float) and answer.is_integer():
            answer = int(answer)  # the files hold 27.0
        items.append(Item(f"amc23-{row.get('id', number)}", prompt, str(answer), "amc23"))
    return items


TASKS = (Task("amc23", "AMC23", "math", 8192, load),)
