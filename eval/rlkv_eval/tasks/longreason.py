"""LongReason (arXiv 2501.15089): multiple choice over a long background, at 64K tokens as in the paper.

The paper's tables use 400 of the 794 questions (shuffled with seed 42), and its limit of 71,680 tokens is on
prompt and answer together. The prompt has the three parts of the authors' evaluator.
"""

from __future__ import annotations

from pathlib import Path

from rlkv_eval.tasks.base import Item, Task
from rlkv_eval.tasks.sources import column, fill, read_rows, sample

FILES = ("longreason/64k.jsonl", "longreason/64k.jsonl.gz", "longreason.jsonl")
HUB: list[tuple[str, str | None, str]] = [("lz1bytedance/LongReason", None, "64k")]
QUESTIONS = 400
LIMIT = 71_680

PROMPT = (
    "### Background Information\n{background}\n\n"
    "### Question about the Background Information\n{question}\n\n"
    "### Answer\nThe last line of your response should be of the following format: 'Answer: $LETTER' "
    "(without quotes) where LETTER is one of ABCD. Think step by step before answering."
)


def load(data_dir: Path | None) -> list[Item]:
    items = []
    rows = read_rows(data_dir, "longreason", FILES, HUB)
    for number, row in enumerate(rows):
        row.setdefault("example_idx", number)
    for row in sample(rows, QUESTIONS):
        background = str(column(row, "longreason", "background"))
        question = str(column(row, "longreason", "final_inquiry", "question"))
        prompt = fill(PROMPT, background=background, question=question)
        answer = str(column(row, "longreason", "answer")).strip().strip("().").upper()
        items.append(Item(f"longreason-{row['example_idx']}", prompt, answer, "longreason"))
    return items


TASKS = (Task("longreason", "LongReason-64K", "choice", LIMIT, load, max_length=LIMIT),)
