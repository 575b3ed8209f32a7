"""Greedy answers of many masks to many problems, in one batch, written to disk one by one.

Each row of ``rows.jsonl`` is one graded answer. A killed run loses only the answers that were being written:
the next one reads the rows that are there and asks for the others.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rlkv.data import Encoded
from rlkv.errors import RLKVError
from rlkv.files import whole_lines
from rlkv.rewards import Reward, grade
from rlkv.rollout import answer_text
from rlkv.sampler import Completion, Sampler, SamplingParams

REPORT_SECONDS = 30.0  # between progress lines where there is no terminal


@dataclass(frozen=True)
class Row:
    """One answer; lengths in tokens, the stop token counted."""

    mask: str
    problem: str
    task: str
    kind: str
    score: float
    prompt_tokens: int
    tokens: int
    digest: str = ""  # of the problem (see Problem.digest; rows of older versions have none)

    @property
    def length(self) -> int:
        """Tokens in the request when it ended."""
        return self.prompt_tokens + self.tokens


def answer_masks(
    path: Path,
    sampler: Sampler,
    tokenizer: Any,
    prompts: Encoded,
    masks: Mapping[str, torch.Tensor],
    reward: Reward,
    *,
    max_new_tokens: int,
    chunk: int = 8192,
    begin: Callable[[], None] = lambda: None,
) -> dict[str, list[Row]]:
    """For each mask its rows, in the order of ``prompts``.

    ``masks``: name -> gates float [layers, kv_heads]. ``chunk`` answers at most go into one sampler run (each
    brings its own gates). ``begin`` is called before the first answer is written, or at once if ``path``
    has some. Raises RLKVError for two problems of one id, and if ``path`` holds an answer to a problem that
    has changed since.
    """
    identities = [identity(problem.task, problem.id) for problem in prompts.problems]
    if len(set(identities)) < len(identities):
        twice = next(item for item in identities if identities.count(item) > 1)
        raise RLKVError(f"two problems have the id {twice!r}; ids must differ so that a run can be resumed")
    digests = [problem.digest for problem in prompts.problems]
    found = read_rows(path)
    now = dict(zip(identities, digests, strict=True))
    for row in found.values():
        if row.digest not in ("", now.get(row.problem, row.digest)):
            raise RLKVError(
                f"{path} holds an answer to another problem {row.problem!r} (its prompt or gold answer has "
                "changed since): choose another output"
            )
    wanted = [
        (name, number)
        for number in range(len(identities))
        for name in masks
        if (name, identities[number]) not in found
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
    if found:
        begin()
    with path.open("a", encoding="utf-8") as file, AnswerProgress(len(wanted)) as tick:
        for start in range(0, len(wanted), chunk):
            part = wanted[start : start + chunk]

            def finish(completion: Completion, part: list[tuple[str, int]] = part) -> None:
                name, number = part[completion.index]
                problem, tokens = prompts.problems[number], prompts.tokens[number]
                text = answer_text(tokenizer, completion, prompts.thinking[number])
                verdict = grade(reward, text, problem, completion.finish)
                row = Row(
                    mask=name,
                    problem=identities[number],
                    task=problem.task,
                    kind=verdict.kind,
                    score=verdict.score,
                    prompt_tokens=len(tokens),
                    tokens=len(completion.tokens),
                    digest=digests[number],
                )
                if not found:
                    begin()
                file.write(json.dumps(asdict(row)) + "\n")
                file.flush()
                found[name, row.problem] = row
                tick(row.tokens)

            gates = torch.stack([masks[name] for name, _ in part])
            sampler.generate([prompts.tokens[number] for _, number in part], params, gates, on_finish=finish)
    return {name: [found[name, problem] for problem in identities] for name in masks}


def identity(task: str, problem: str) -> str:
    """A problem's id within a run: two tasks may number their problems alike."""
    return f"{task}/{problem}" if task else problem


def read_rows(path: Path) -> dict[tuple[str, str], Row]:
    """(mask, problem) -> row. A last line cut short by a kill is removed from the file."""
    rows: dict[tuple[str, str], Row] = {}
    for number, line in enumerate(whole_lines(path), 1):
        try:
            row = Row(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise RLKVError(f"{path}: line {number} is not a row of an evaluation ({error})") from None
        rows[row.mask, row.problem] = row
    return rows


class AnswerProgress:
    """``with AnswerProgress(total) as tick``: ``tick(tokens)`` moves a bar, or prints a line at times."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.tokens = total, 0, 0
        self.began = self.said = time.monotonic()
        self.bar: Any = nullcontext()
        if sys.stdout.isatty() and total:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self.bar = Progress(*columns)
            self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> AnswerProgress:
        self.bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.__exit__(*error)
        if self.total and error[0] is None:
            print(self.line(), flush=True)

    def __call__(self, tokens: int) -> None:
        self.done, self.tokens = self.done + 1, self.tokens + tokens
        now = time.monotonic()
        if not isinstance(self.bar, nullcontext):
            self.bar.update(self.task, completed=self.done, description=f"{self.speed():,.0f} tok/s")
        elif now - self.said > REPORT_SECONDS:
            self.said = now
            print(self.line(), flush=True)

    def speed(self) -> float:
        return self.tokens / max(time.monotonic() - self.began, 1e-9)

    def line(self) -> str:
        seconds = time.monotonic() - self.began
        return f"{self.done} of {self.total} answers, {seconds:.0f} s, {self.speed():,.0f} tokens/s"
