"""MATH-500: the 500 test problems of PRM800K's split (arXiv 2305.20050) of MATH (arXiv 2103.03874)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlkv_eval.tasks.base import Item, Task
from rlkv_eval.tasks.sources import MATH_PROMPT, column, fill, read_rows

FILES = ("math500/test.jsonl", "math_500/test.jsonl", "math500.jsonl")
HUB = [("HuggingFaceH4/MATH-500", None, "test")]


def load(data_dir: Path | None) -> list[Item]:
    items = []
    for row in read_rows(data_dir, "math500", FILES, HUB):
        prompt = fill(MATH_PROMPT, problem=str(column(row, "math500", "problem")))
        extra: dict[str, Any] = {key: row[key] for key in ("subject", "level") if key in row}
        answer, name = str(column(row, "math500", "answer")), str(column(row, "math500", "unique_id"))
        items.append(Item(name, prompt, answer, "math500", extra))
    return items


TASKS = (Task("math500", "MATH-500", "math", 8192, load),)
