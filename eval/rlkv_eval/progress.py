"""Progress of a run: a bar with the accuracy so far, or a line at times where there is no terminal."""

from __future__ import annotations

import sys
import time
from typing import Any

from rlkv_eval.results import Row

REPORT_SECONDS = 30.0  # between lines where there is no terminal


class Progress:
    """``with Progress(title, total, rows) as tick``: ``tick(row)`` after each answer.

    ``rows`` are those of an earlier, interrupted run: they count in the accuracy, not in the speed.
    """

    def __init__(self, title: str, total: int, rows: list[Row]) -> None:
        self.title, self.total = title, total
        self.done, self.score = len(rows), sum(row.score for row in rows)
        self.started, self.tokens = self.done, 0
        self.began = self.said = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[state]}"),
            )
            self.bar = Bar(*columns)
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.done, state="")
            self.bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bar:
            self.bar.stop()
        else:
            print(self.line(), flush=True)

    def __call__(self, row: Row) -> None:
        self.done, self.score, self.tokens = (
            self.done + 1,
            self.score + row.score,
            self.tokens + row.new_tokens,
        )
        now = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=self.done, state=self.state())
        elif now - self.said > REPORT_SECONDS:
            self.said = now
            print(self.line(), flush=True)

    def state(self) -> str:
        speed = self.tokens / max(time.monotonic() - self.began, 1e-9)
        return f"{self.score / max(self.done, 1):.1%} right, {speed:,.0f} tok/s"

    def line(self) -> str:
        seconds = time.monotonic() - self.began
        return f"{self.title}: {self.done} of {self.total} answers, {self.state()}, {seconds:.0f} s"
