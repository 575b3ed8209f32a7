"""What a benchmark is: a named list of problems, the grader that reads the answers, and a length limit.

    task = get_task("math500")
    items = task.load(Path("data"))        # or task.load(None): from the hub

Each file of this folder holds one benchmark, as ``TASKS``: a tuple of ``Task``. It is imported when one of
its tasks is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rlkv.errors import RLKVError

GRADERS = ("math", "choice", "code", "exact")

# Name of a task -> the file of this folder that holds it, in the order of the paper's tables.
HOMES = {
    "gsm8k": "gsm8k",
    "math500": "math500",
    "aime24": "aime",
    "aime25": "aime",
    "amc23": "amc",
    "mbpp": "mbpp",
    "mmlu_pro_chemistry": "mmlu_pro",
    "mmlu_pro_computer_science": "mmlu_pro",
    "mmlu_pro_law": "mmlu_pro",
    "mmlu_pro_physics": "mmlu_pro",
    "mmlu_pro": "mmlu_pro",
    "longreason": "longreason",
    "pocket": "pocket",
    "pocket_resolve": "pocket",
    "pocket_search": "pocket",
    "pocket_ledger": "pocket",
    "pocket_recall": "pocket",
}
# Names in the authors' files.
ALIASES = {
    "math_500": "math500",
    "mmlu_pro_che": "mmlu_pro_chemistry",
    "mmlu_pro_com": "mmlu_pro_computer_science",
    "mmlu_pro_phy": "mmlu_pro_physics",
}


@dataclass(frozen=True)
class Item:
    """One problem. ``prompt`` is the whole user message; ``answer`` the gold answer as the grader reads it.

    ``id`` is unique in its task and stays the same from run to run. ``extra`` holds what only the grader or a
    table needs (subject, level, tests of a program).
    """

    id: str
    prompt: str
    answer: str
    task: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """One benchmark. ``load(data_dir)`` reads its problems from a local folder, or from the hub for None.

    ``max_new_tokens`` is the paper's limit on the answer; ``max_length``, where it is not 0, its limit on
    prompt and answer together. ``subset_of`` names the task that this one is a part of ("" for none).
    ``load`` raises RLKVError when the problems cannot be read.
    """

    name: str
    title: str
    grader: str
    max_new_tokens: int
    load: Callable[[Path | None], list[Item]]
    subset_of: str = ""
    max_length: int = 0

    def __post_init__(self) -> None:
        if self.grader not in GRADERS:
            raise RLKVError(f"task {self.name}: no grader {self.grader!r}; there are {', '.join(GRADERS)}")


def task_names() -> list[str]:
    """Names of all tasks, in the order of the paper's tables; ``jsonl:<path>`` comes beside them."""
    return list(HOMES)


def get_task(name: str) -> Task:
    """The task of that name (also spelt with "-" for "_", or as in the authors' files), or ``jsonl:<path>``.

    ``jsonl[<grader>]:<path>`` names the grader of the file's answers; without one it is math. Raises
    RLKVError for an unknown name.
    """
    if name.startswith(("jsonl:", "jsonl[")):
        from rlkv_eval.tasks.jsonl import jsonl_task

        return jsonl_task(name)
    key = name.strip().lower().replace("-", "_").replace(" ", "_").replace(":", "_")
    key = ALIASES.get(key, key)
    if key not in HOMES:
        near = get_close_matches(key, HOMES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RLKVError(f"no task {name!r}; {hint}there are {', '.join(HOMES)}, and jsonl:<path>")
    module = importlib.import_module(f"rlkv_eval.tasks.{HOMES[key]}")
    return next(task for task in module.TASKS if task.name == key)
