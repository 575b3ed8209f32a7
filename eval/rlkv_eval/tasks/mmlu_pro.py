"""MMLU-Pro (arXiv 2406.01574): questions with up to ten options; the paper's four subjects, and all 14.

The paper takes 500 questions of a subject that has more (shuffled with seed 42); so do the subject tasks.
``mmlu_pro`` is the whole test split. The prompt is that of simple-evals, with the letters that there are.
"""

from __future__ import annotations

import string
from functools import partial
from pathlib import Path

from rlkv.errors import RLKVError
from rlkv_eval.tasks.base import Item, Task
from rlkv_eval.tasks.sources import Row, column, fill, read_rows, sample

FILES = ("mmlu_pro/test.jsonl.gz", "mmlu_pro/test.jsonl", "mmlu_pro.jsonl")
HUB = [("TIGER-Lab/MMLU-Pro", None, "test")]
SUBJECTS = {"chemistry": "Chemistry", "computer science": "CS", "law": "Law", "physics": "Physics"}
QUESTIONS = 500  # of a subject, in the paper

PROMPT = (
    "Answer the following multiple choice question. The last line of your response should be of the "
    "following format: 'Answer: $LETTER' (without quotes) where LETTER is one of {letters}. Think step by "
    "step before answering.\n\n{question}\n\n{options}"
)


def load(data_dir: Path | None, name: str, subject: str = "") -> list[Item]:
    rows = read_rows(data_dir, name, FILES, HUB)
    if subject:
        rows = sample([row for row in rows if row.get("category") == subject], QUESTIONS)
        if not rows:
            raise RLKVError(f"task {name}: no row has the category {subject!r}")
    return [item(row, name) for row in rows]


def item(row: Row, name: str) -> Item:
    options = [str(option) for option in column(row, name, "options")]
    letters = string.ascii_uppercase[: len(options)]
    answer = str(column(row, name, "answer")).strip().upper()
    if answer not in letters:
        raise RLKVError(f"task {name}: question {row.get('question_id')} has no option {answer!r}")
    lines = "\n".join(f"{letter}) {option}" for letter, option in zip(letters, options, strict=True))
    prompt = fill(PROMPT, letters=letters, question=str(column(row, name, "question")).strip(), options=lines)
    extra = {"options": options, "subject": row.get("category", "")}
    return Item(f"mmlu_pro-{column(row, name, 'question_id')}", prompt, answer, name, extra)


def _subject(subject: str, title: str) -> Task:
    name = f"mmlu_pro_{subject.replace(' ', '_')}"
    load_subject = partial(load, name=name, subject=subject)
    return Task(name, f"MMLU-Pro {title}", "choice", 8192, load_subject, subset_of="mmlu_pro")


TASKS = (
    *(_subject(subject, title) for subject, title in SUBJECTS.items()),
    Task("mmlu_pro", "MMLU-Pro", "choice", 8192, partial(load, name="mmlu_pro")),
)
