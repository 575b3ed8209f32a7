"""Stand-ins for tests of the runner: tasks made up here, and a backend that answers at once."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rlkv_eval import plan, runner
from rlkv_eval.backend import Answer
from rlkv_eval.config import RunConfig
from rlkv_eval.graders.base import Verdict
from rlkv_eval.jobs import Job, Request
from rlkv_eval.plan import Plan
from rlkv_eval.results import Row
from rlkv_eval.tasks.base import Item, Task


def make_items(task: str, count: int = 12) -> list[Item]:
    return [Item(f"{task}-{number}", f"what is {number}?", str(number % 3), task) for number in range(count)]


def make_task(name: str) -> Task:
    """A task whose answers are 0, 1 or 2."""
    return Task(name, name.upper(), "exact", 100, lambda folder: make_items(name))


def last_character(grader: str, item: Item, text: str, finished: bool) -> Verdict:
    """Right if the text ends in the gold answer."""
    if not finished:
        return Verdict("truncated", 0.0, None, "length limit", "cut off")
    equal = text.endswith(item.answer)
    return Verdict("correct" if equal else "wrong", float(equal), text[-1], "last", "compared")


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any name is a task; nothing of it needs a grader's package."""
    monkeypatch.setattr(plan, "get_task", make_task)
    monkeypatch.setattr(plan, "preflight", lambda graders: list(graders))
    monkeypatch.setattr(runner, "grade", last_character)


@dataclass
class Instant:
    """Answers that depend on all that may decide an answer and on nothing else, in a shuffled order.

    After ``fail_after`` answers it breaks off, as a kill does.
    """

    plan: Plan
    fail_after: int | None = None
    model: str = "made-up"
    machine: str = "none"
    facts: dict[str, Any] = field(default_factory=dict)
    asked: list[Request] = field(default_factory=list)

    def skipped(self, job: Job) -> list[str]:
        return []

    def open(self, job: Job) -> InstantSession:
        return InstantSession(self, job)


@dataclass
class InstantSession:
    backend: Instant
    job: Job
    mask: Any = None
    true_sparsity: float = 0.0

    def answer(self, requests: Sequence[Request], on_answer: Callable[[Answer], None]) -> None:
        for request in random.sample(list(requests), len(requests)):
            if self.backend.fail_after is not None and len(self.backend.asked) >= self.backend.fail_after:
                raise KeyboardInterrupt
            self.backend.asked.append(request)
            seed = self.backend.plan.sampling_seed(self.job)
            facts = (self.job.method, self.job.sparsity, self.job.draw, request.stream, seed)
            digest = hashlib.sha256(repr(facts).encode()).digest()
            text = f"täxt\n{digest.hex()} {digest[0] % 3}"
            finish = "length" if digest[1] % 8 == 0 else "stop"
            on_answer(Answer(request, text, finish, 5, digest[2], 10 * digest[2], 20 * digest[2]))


def config(output: Path, **changes: Any) -> RunConfig:
    """Two tasks, the full cache twice, three samples a problem; nothing that needs a model to plan."""
    values: dict[str, Any] = {
        "model": "pocket",
        "tasks": ["alpha", "beta"],
        "methods": ["full", "random"],
        "sparsities": [0.5],
        "draws": 2,
        "noise_floor": True,
        "k": 3,
        "temperature": 1.0,
        "output": str(output),
    }
    return RunConfig(**(values | changes))


def make_row(**changes: Any) -> Row:
    """A right answer to problem 0."""
    values: dict[str, Any] = {
        "id": "0",
        "sample": 0,
        "task": "alpha",
        "method": "full",
        "sparsity": 0.0,
        "seed": 0,
        "kind": "correct",
        "score": 1.0,
        "extracted": "1",
        "gold": "1",
        "rule": "boxed",
        "reason": "equal",
        "finish": "stop",
        "prompt_tokens": 10,
        "new_tokens": 20,
        "kv_bytes": 100,
        "full_kv_bytes": 200,
        "text": "so it is 1",
    }
    return Row(**(values | changes))
