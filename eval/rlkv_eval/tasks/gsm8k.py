"""GSM8K (arXiv 2110.14168): grade-school word problems, 1,319 in the test split."""

from __future__ import annotations

from pathlib import Path

from rlkv_eval.tasks.base import Item, Task
from rlkv_eval.tasks.sources import MATH_PROMPT, column, fill, read_rows

FILES = ("gsm8k/test.jsonl", "gsm8k.jsonl")
HUB = [("openai/gsm8k", "main", "test"), ("gsm8k", "main", "test")]


def load(data_dir: Path | None) -> list[Item]:
    items = []
    for number, row in enumerate(read_rows(data_dir, "gsm8k", FILES, HUB)):
        solution = str(column(row, "gsm8k", "answer"))
        answer = solution.rpartition("####")[2].strip()
        prompt = fill(MATH_PROMPT, problem=str(column(row, "gsm8k", "question", "problem")))
        items.append(Item(f"gsm8k-{number}", prompt, answer, "gsm8k", {"solution": solution}))
    return items


TASKS = (Task("gsm8k", "GSM8K", "math", 8192, load),)
