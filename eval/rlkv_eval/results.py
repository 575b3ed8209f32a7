"""What a run leaves on disk, written and read.

    <output>/<task>/<run>/rows.jsonl   one graded answer a line
                          run.json     settings, model, method, true sparsity, window, versions, seeds
                          mask.json    the head mask, where the method has one

``run`` is "full", "full-repeat" (the noise floor), or "<method>-s<sparsity>" with "-seed<k>" for drawn masks.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlkv.errors import RLKVError
from rlkv.files import whole_lines, write_atomically

if TYPE_CHECKING:
    from rlkv.mask import HeadMask

ROWS, RUN, MASK = "rows.jsonl", "run.json", "mask.json"
FULL, REPEAT = "full", "full-repeat"


@dataclass(frozen=True)
class Row:
    """One graded answer. Lengths in tokens, the stop token counted; bytes of keys and values held at its end.

    ``kind`` is one of ``graders.base.KINDS``, ``finish`` "stop" or "length". Bytes are None where they cannot
    be known (a server's). ``text`` is the completion, without the prompt.
    """

    id: str
    sample: int
    task: str
    method: str
    sparsity: float
    seed: int
    kind: str
    score: float
    extracted: str | None
    gold: str
    rule: str
    reason: str
    finish: str
    prompt_tokens: int
    new_tokens: int
    kv_bytes: int | None
    full_kv_bytes: int | None
    text: str

    @property
    def key(self) -> tuple[str, int]:
        """What identifies a row within its run."""
        return self.id, self.sample


@dataclass(frozen=True)
class Run:
    """One method at one sparsity on one task. ``info`` is run.json; rows are in order of (id, sample)."""

    folder: Path
    task: str
    method: str
    sparsity: float  # requested
    seed: int
    info: dict[str, Any] = field(repr=False)
    rows: tuple[Row, ...] = field(repr=False)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def repeat(self) -> bool:
        """Whether this is the second full-cache run, which only serves the noise floor."""
        return self.name == REPEAT

    @property
    def true_sparsity(self) -> float:
        """Fraction of heads made local; for methods without a head mask the requested sparsity."""
        return float(self.info.get("true_sparsity", self.sparsity))

    @property
    def complete(self) -> bool:
        """Whether every answer is there."""
        return len(self.rows) == self.info["answers"]

    @cached_property
    def scores(self) -> dict[str, list[float]]:
        """Problem id -> the score of each of its samples."""
        found: dict[str, list[float]] = {}
        for row in self.rows:
            found.setdefault(row.id, []).append(row.score)
        return found

    @property
    def accuracy(self) -> float:
        """Mean over problems of the mean over samples, in [0, 1]."""
        return float(np.mean([np.mean(scores) for scores in self.scores.values()]))

    @property
    def kinds(self) -> Counter[str]:
        """How many answers were correct, wrong, truncated, ..."""
        return Counter(row.kind for row in self.rows)

    def mask(self) -> HeadMask | None:
        """The head mask, or None for a method that has none."""
        from rlkv.mask import HeadMask  # here, because it needs torch and tables do not

        path = self.folder / MASK
        return HeadMask.load(path) if path.is_file() else None


@dataclass(frozen=True)
class Results:
    """All runs under one output folder, in order of task, method, sparsity and seed."""

    folder: Path
    runs: tuple[Run, ...]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(run.task for run in self.runs))

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(run.method for run in self.runs))

    @property
    def sparsities(self) -> list[float]:
        """Requested sparsities of the runs that are not the full cache."""
        return sorted({run.sparsity for run in self.runs if run.method != FULL})

    def find(self, task: str, method: str, sparsity: float | None = None) -> list[Run]:
        """The runs of a method on a task (at one requested sparsity): one, or one for each drawn mask."""
        return [
            run
            for run in self.runs
            if (run.task, run.method) == (task, method)
            and not run.repeat
            and (sparsity is None or run.sparsity == sparsity)
        ]

    def full(self, task: str) -> Run | None:
        """The full-cache run, or None."""
        return next(iter(self.find(task, FULL)), None)

    def repeat(self, task: str) -> Run | None:
        """The second full-cache run, or None."""
        return next((run for run in self.runs if run.task == task and run.repeat), None)


def load_results(folder: str | Path) -> Results:
    """Every run under ``folder``; RLKVError when there is none, or one cannot be read.

    Runs still under way are read as far as they are; what they lack can be seen by ``Run.complete``.
    """
    folder = Path(folder)
    runs = [load_run(path.parent) for path in sorted(folder.glob(f"*/*/{RUN}"))]
    if not runs:
        shards = " (only shards: run `rlkv-eval merge` first)" if any(folder.glob("shard-*")) else ""
        raise RLKVError(f"{folder} holds no evaluation: expected <task>/<run>/{RUN} below it{shards}")
    order = {FULL: 0}
    runs.sort(key=lambda run: (run.task, order.get(run.method, 1), run.method, run.sparsity, run.seed))
    return Results(folder, tuple(runs))


def load_run(folder: Path) -> Run:
    """One run's folder; RLKVError when run.json or a row cannot be read."""
    info = read_info(folder)
    rows = sorted(read_rows(folder / ROWS), key=lambda row: row.key)
    try:
        facts = info["task"], info["method"], float(info["sparsity"]), int(info["seed"])
    except KeyError as error:
        raise RLKVError(f"{folder / RUN} lacks {error}: it was not written by rlkv-eval") from None
    return Run(folder, *facts, info, tuple(rows))


def read_info(folder: Path) -> dict[str, Any]:
    """run.json of a run's folder."""
    path = folder / RUN
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RLKVError(f"{path} cannot be read: {error}") from None
    return info


NAMES = [item.name for item in fields(Row)]


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file that may still grow: a line cut short by a kill is left out."""
    content = path.read_bytes() if path.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines(), 1):
        yield parse_row(line, f"{path}: line {number}")


def recover_rows(path: Path) -> Iterator[Row]:
    """The rows to go on from: as :func:`read_rows`, but a line cut short is removed from the file."""
    whole_lines(path)
    return read_rows(path)


def parse_row(line: bytes, where: str) -> Row:
    """A row from its JSON; keys that are not a row's are an error, like those that are missing."""
    try:
        return Row(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise RLKVError(f"{where} is not a row of an evaluation ({error})") from None


def row_line(row: Row) -> str:
    """A row as one line of JSON, newline included."""
    return json.dumps(asdict(row), ensure_ascii=False) + "\n"


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """All rows of a finished run, in order of (id, sample), replacing the file in one move."""
    write_atomically(path, "".join(row_line(row) for row in sorted(rows, key=lambda row: row.key)))


def write_info(folder: Path, info: dict[str, Any]) -> None:
    """run.json, replaced in one move."""
    write_atomically(folder / RUN, json.dumps(info, indent=2, ensure_ascii=False) + "\n")


def run_name(method: str, sparsity: float, seed: int | None = None) -> str:
    """The folder of a run; ``seed`` only for a method that draws its mask."""
    if method == FULL:
        return FULL
    return f"{method}-s{sparsity:g}" + ("" if seed is None else f"-seed{seed}")


def task_folder(task: str) -> str:
    """A folder's name for a task: its own name, or a safe one for ``jsonl:path/to/file.jsonl``."""
    return re.sub(r"[^\w.+-]+", "_", task).strip("_.") or "task"
