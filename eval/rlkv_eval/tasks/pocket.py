"""The pocket reasoner's own tasks (``rlkv.pocket``): 512 of the test split each, made on the spot."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rlkv_eval.tasks.base import Item, Task

PROBLEMS = 512
REASONING = ("resolve", "search", "ledger")


def load(data_dir: Path | None, names: tuple[str, ...], task: str) -> list[Item]:
    """``data_dir`` is not looked at. Several tasks take turns, so that the first n are a fair share."""
    from rlkv import pocket

    lists = [pocket.problems(name, "test", -(-PROBLEMS // len(names))) for name in names]
    rows = [row for group in zip(*lists, strict=True) for row in group][:PROBLEMS]
    return [Item(row["id"], row["prompt"], row["answer"], task, {"kind": row["task"]}) for row in rows]


TASKS = (
    Task("pocket", "Pocket reasoning", "exact", 1024, partial(load, names=REASONING, task="pocket")),
    *(
        Task(
            f"pocket_{name}",
            f"Pocket {name}",
            "exact",
            1024,
            partial(load, names=(name,), task=f"pocket_{name}"),
            subset_of="pocket" if name in REASONING else "",
        )
        for name in (*REASONING, "recall")
    ),
)
