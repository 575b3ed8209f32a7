"""What a run shows of itself: metrics.jsonl (one line a step), TensorBoard curves, a progress bar."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


class Metrics:
    """Writes steps below ``folder``; ``keep_bytes`` of an earlier metrics.jsonl belong to the resumed run.

    What a killed run wrote after its last checkpoint is cut off, so no step stands there twice.
    """

    def __init__(self, folder: Path, step: int = 0, keep_bytes: int = 0, tensorboard: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self.file = self.path.open("ab")
        self.file.truncate(keep_bytes)
        self.file.seek(0, 2)
        self.writer: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                print("TensorBoard is not installed: curves are in metrics.jsonl only")
            else:
                self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add one step's numbers."""
        line = json.dumps({"step": step, **{key: _short(value) for key, value in values.items()}})
        self.file.write(line.encode() + b"\n")
        self.file.flush()
        if self.writer is not None:
            for key, value in values.items():
                self.writer.add_scalar(key, value, step)

    @property
    def bytes(self) -> int:
        """Length of metrics.jsonl so far, for the checkpoint."""
        return self.file.tell()

    def close(self) -> None:
        self.file.close()
        if self.writer is not None:
            self.writer.close()


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.7g}")


class Progress:
    """A bar with reward, mean gate, tokens/s and time left on a terminal; one line a step elsewhere."""

    def __init__(self, total: int, done: int = 0) -> None:
        self.total, self.done, self.seconds = total, done, 0.0
        self.steps = 0
        self.bar: Any = None
        if not sys.stdout.isatty():
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            MofNCompleteColumn(),
            BarColumn(bar_width=10),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self.bar = Bar(*columns)
        self.bar.start()
        self.task = self.bar.add_task("sampling the first batch", total=total, completed=done)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def advance(self, values: dict[str, float]) -> None:
        """One step is done."""
        self.done, self.steps, self.seconds = self.done + 1, self.steps + 1, self.seconds + values["seconds"]
        text = (
            f"reward {values['reward']:.2f} gate {values['gate_mean']:.2f} local {values['sparsity']:.0%} "
            f"{kilo(values['rollout_tokens_per_second'])} + {kilo(values['train_tokens_per_second'])} tok/s"
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, description=text)
            return
        left = (self.total - self.done) * self.seconds / self.steps
        print(
            f"step {self.done}/{self.total}  {text}  {values['seconds']:.1f} s  left {clock(left)}",
            flush=True,
        )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def kilo(rate: float) -> str:
    """``950``, ``7.7k``, ``55k``."""
    return f"{rate:.0f}" if rate < 1000 else f"{rate / 1000:.1f}k" if rate < 10_000 else f"{rate / 1000:.0f}k"


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
