"""AIME 2024 and 2025 (American Invitational Mathematics Examination): 30 problems each, answers 0 to 999."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rlkv_eval.tasks.base import Item, Task
from rlkv_eval.tasks.sources import MATH_PROMPT, column, fill, read_rows

HUB: dict[str, list[tuple[str, str | None, str]]] = {
    "aime24": [("HuggingFaceH4/aime_2024", None, "train"), ("math-ai/aime24", None, "test")],
    "aime25": [("math-ai/aime25", None, "test"), ("yentinglin/aime_2025", None, "train")],
}


def load(data_dir: Path | None, name: str) -> list[Item]:
    items = []
    for number, row in enumerate(
        read_rows(data_dir, name, (f"{name}/test.jsonl", f"{name}.jsonl"), HUB[name])
    ):
        prompt = fill(MATH_PROMPT, problem=str(column(row, name, "problem", "question")))
        answer = str(column(row, name, "answer", "solution"))
        items.append(Item(f"{name}-{row.get('id', number)}", prompt, answer, name))
    return items


TASKS = (
    Task("aime24", "AIME24", "math", 16384, partial(load, name="aime24")),
    Task("aime25", "AIME25", "math", 16384, partial(load, name="aime25")),
)
