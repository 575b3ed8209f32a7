"""What answers requests: a model in this process (local.py) or a server (endpoint.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from rlkv_eval.jobs import Job, Request

if TYPE_CHECKING:
    from rlkv.mask import HeadMask


@dataclass(frozen=True)
class Answer:
    """A completion as text (without the stop token), how it ended, its lengths in tokens, its bytes of KV."""

    request: Request
    text: str
    finish: str  # "stop" or "length"
    prompt_tokens: int
    new_tokens: int
    kv_bytes: int | None = None
    full_kv_bytes: int | None = None


class Session(Protocol):
    """One job, ready to be answered. ``mask``: its head mask, None for a method without one."""

    mask: HeadMask | None
    true_sparsity: float

    def answer(self, requests: Sequence[Request], on_answer: Callable[[Answer], None]) -> None:
        """Answer all; ``on_answer`` is called in this thread as each is done."""


class Backend(Protocol):
    """``model``: the name to record. ``facts``: what else run.json says of it."""

    model: str
    facts: dict[str, Any]
    machine: str

    def skipped(self, job: Job) -> list[str]:
        """Ids of problems whose prompt does not fit."""

    def open(self, job: Job) -> Session:
        """Make the job's method ready."""
