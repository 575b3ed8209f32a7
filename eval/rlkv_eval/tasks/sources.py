"""Rows of a benchmark from a local folder, or from the hub; and prompts with a hole."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlkv.errors import RLKVError

# The instruction of lighteval's MATH-500 and AIME tasks (after Llama 3's evaluation and simple-evals), which
# the authors' prompts open with; its wording, double space included, is part of the benchmark.
MATH_PROMPT = (
    "Solve the following math problem efficiently and clearly.  The last line of your response should be of "
    "the following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct' "
    "(without quotes) where ANSWER is just the final number or expression that solves the problem. Think "
    "step by step before answering.\n\n{problem}"
)

Row = dict[str, Any]


def fill(template: str, **values: str) -> str:
    """``template`` with each ``{name}`` replaced; other braces, and those of the values, stay (LaTeX)."""
    for name in values:
        if "{" + name + "}" not in template:
            raise RLKVError(f"the prompt template has no {{{name}}}: {template[:60]!r}")
    holes = re.compile("{(" + "|".join(values) + ")}")
    return holes.sub(lambda hole: values[hole[1]], template)


def read_rows(
    data_dir: Path | None, task: str, files: Sequence[str], hub: Sequence[tuple[str, str | None, str]]
) -> list[Row]:
    """Rows from the first of ``files`` below ``data_dir``, or from the first of ``hub`` that can be read.

    ``hub``: (dataset id, configuration or None, split). Files are JSON Lines, gzipped or not. Raises
    RLKVError that names all the places.
    """
    if data_dir is None:
        return _from_hub(task, hub)
    for name in files:
        path = Path(data_dir) / name
        if path.is_file():
            return read_jsonl(path)
    raise RLKVError(
        f"task {task}: none of {', '.join(files)} is in {data_dir}; leave data_dir out for the hub"
    )


def read_jsonl(path: Path) -> list[Row]:
    """One JSON object a line. Raises RLKVError with the number of the line that is none."""
    if not path.is_file():
        raise RLKVError(f"{path}: no such file")
    opener = gzip.open if path.suffix == ".gz" else open
    rows = []
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise RLKVError(f"{path}: line {number} is not valid JSON: {error.msg}") from None
                if not isinstance(row, dict):
                    raise RLKVError(f"{path}: line {number} is not a JSON object")
                rows.append(row)
    except (OSError, UnicodeDecodeError) as error:
        raise RLKVError(f"{path}: cannot be read: {error}") from None
    if not rows:
        raise RLKVError(f"{path}: the file is empty")
    return rows


def _from_hub(task: str, hub: Sequence[tuple[str, str | None, str]]) -> list[Row]:
    try:
        import datasets
    except ImportError:
        raise RLKVError(f"task {task}: the package datasets is missing; run `pip install datasets`") from None
    failures = []
    for name, configuration, split in hub:
        try:
            return [dict(row) for row in datasets.load_dataset(name, configuration, split=split)]
        except Exception as error:  # the hub client raises many types, all meaning "could not be read"
            reason = str(error).strip().splitlines() or [type(error).__name__]
            failures.append(f"{name} ({reason[0][:120]})")
    raise RLKVError(f"task {task}: cannot be read from the hub: {'; '.join(failures)}; use a local data_dir")


def column(row: Row, task: str, *names: str) -> Any:
    """The first column of ``names`` that the row has; data sets call the same thing by several names."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise RLKVError(f"task {task}: a row has no {' or '.join(names)}; it has {', '.join(row)}")


def sample(rows: Sequence[Row], n: int, seed: int = 42) -> list[Row]:
    """``n`` rows as ``datasets`` shuffles them with this seed (as the authors do); all if there are fewer."""
    if len(rows) <= n:
        return list(rows)
    import numpy

    order = numpy.random.default_rng(seed).permutation(len(rows))
    return [rows[index] for index in order[:n]]
