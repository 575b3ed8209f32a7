"""The pieces of a run: jobs (one method at one sparsity on one task) and the answers that they ask for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlkv_eval.methods.base import Method, get_method
from rlkv_eval.results import REPEAT, run_name, task_folder
from rlkv_eval.tasks.base import Item, Task


@dataclass(frozen=True)
class Request:
    """One answer to ask for. ``stream``: its random stream, the same in every batch, shard and method."""

    item: Item
    sample: int
    stream: int

    @property
    def key(self) -> tuple[str, int]:
        """What identifies its row within a run."""
        return self.item.id, self.sample


@dataclass(frozen=True)
class Job:
    """One run: a method at a sparsity on a task; ``draw`` numbers drawn masks, ``repeat``: noise floor."""

    task: Task
    items: tuple[Item, ...] = field(repr=False)
    method: str
    options: dict[str, Any]
    sparsity: float = 0.0
    draw: int | None = None
    repeat: bool = False

    @property
    def folder(self) -> Path:
        """Below the output or the shard's folder."""
        name = REPEAT if self.repeat else run_name(self.method, self.sparsity, self.draw)
        return Path(task_folder(self.task.name)) / name

    def make_method(self) -> Method:
        """The method with its settings."""
        drawn = {} if self.draw is None else {"draw": self.draw}
        return get_method(self.method, self.options | drawn)


def stream(item: Item, sample: int) -> int:
    """62 bits that belong to this sample of this problem alone."""
    name = json.dumps([item.task, item.id, sample]).encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") >> 2


def digest(items: Sequence[Item]) -> str:
    """A fingerprint of the problems as they are asked and graded."""
    content = json.dumps([[item.id, item.prompt, item.answer] for item in items], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
