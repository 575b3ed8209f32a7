"""Any JSON Lines file with ``prompt`` and ``answer``: ``jsonl:<path>``, or ``jsonl[choice]:<path>``.

The prompt is used as it is. Columns ``id``, ``options`` (for the choice grader) and all others are kept.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from rlkv.errors import RLKVError
from rlkv_eval.tasks.base import GRADERS, Item, Task
from rlkv_eval.tasks.sources import read_jsonl

SPEC = re.compile(r"jsonl(?:\[(\w+)\])?:(.+)")
LIMIT = 8192


def jsonl_task(spec: str) -> Task:
    """The task of one file, named by it; ``load`` reads it. Raises RLKVError for a bad spec."""
    match = SPEC.fullmatch(spec)
    if match is None:
        raise RLKVError(f"task {spec!r}: expected jsonl:<path> or jsonl[<grader>]:<path>")
    grader, path = match[1] or "math", Path(match[2])
    if grader not in GRADERS:
        raise RLKVError(f"task {spec!r}: no grader {grader!r}; there are {', '.join(GRADERS)}")
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    return Task(name, name, grader, LIMIT, partial(load, path=path, name=name))


def load(data_dir: Path | None, path: Path, name: str) -> list[Item]:
    """``path`` is relative to the working directory, or else to ``data_dir``."""
    if data_dir is not None and not path.is_file():
        path = Path(data_dir) / path
    items, seen = [], set()
    for number, row in enumerate(read_jsonl(path), 1):
        for column in ("prompt", "answer"):
            if not str(row.get(column) or "").strip() and row.get(column) != 0:
                raise RLKVError(f"{path}: row {number} has no {column}")
        identity = str(row.get("id", number - 1))
        if identity in seen:
            raise RLKVError(f"{path}: row {number} repeats the id {identity!r}; ids must differ")
        seen.add(identity)
        extra = {key: value for key, value in row.items() if key not in ("prompt", "answer", "id")}
        items.append(Item(identity, str(row["prompt"]), str(row["answer"]), name, extra))
    return items
