"""Prompt sets: problems from JSONL, from the hub or from the pocket tasks, and their tokens.

A set is named by one string: ``pocket:resolve+search``, a path ending in .jsonl or .json, or a hub dataset
id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlkv.errors import RLKVError


@dataclass
class Problem:
    """One question: ``prompt`` is the user's message, ``answer`` the gold answer as text (LaTeX for math)."""

    prompt: str
    answer: str
    id: str
    task: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """12 hexadecimal digits that tell it from another problem of the same id."""
        return hashlib.sha256(json.dumps([self.prompt, self.answer]).encode()).hexdigest()[:12]


@dataclass
class Encoded:
    """Problems whose prompts fit, with their tokens (chat template applied) and whether a thought is open."""

    problems: list[Problem]
    tokens: list[list[int]]
    thinking: list[bool]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.problems)

    def order(self, epoch: int, seed: int) -> list[int]:
        """The seeded permutation of one epoch: a pure function, so a resumed run sees the same prompts."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return torch.randperm(len(self), generator=generator).tolist()


@dataclass
class PromptSet:
    """Problems, the name of where they came from, and how many rows were left out as empty."""

    problems: list[Problem]
    name: str
    dropped: int = 0

    def __post_init__(self) -> None:
        if not self.problems:
            empty = f" ({self.dropped} rows have an empty prompt or answer)" if self.dropped else ""
            raise RLKVError(f"{self.name}: the prompt set is empty{empty}")

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[dict[str, Any]],
        name: str,
        *,
        prompt: str = "prompt",
        answer: str = "answer",
        template: str = "{prompt}",
    ) -> PromptSet:
        """Rows as dictionaries; ``prompt`` and ``answer`` name the columns, ``template`` wraps the prompt.

        Columns ``id`` and ``task`` are used if there; the others go to ``extra``. Rows that hold nothing
        in a column are left out and counted in ``dropped``; a row without the column raises RLKVError.
        """
        if "{prompt}" not in template:
            raise RLKVError(f"prompt template {template!r} does not contain {{prompt}}")
        problems, dropped = [], 0
        for index, row in enumerate(rows):
            for column in (prompt, answer):
                if column not in row:
                    raise RLKVError(
                        f"{name}: row {index + 1} has no column {column!r}; it has {', '.join(row)}"
                    )
            if any(row[column] is None or not str(row[column]).strip() for column in (prompt, answer)):
                dropped += 1
                continue
            extra = {key: value for key, value in row.items() if key not in (prompt, answer, "id", "task")}
            problems.append(
                Problem(
                    prompt=template.replace("{prompt}", str(row[prompt])),
                    answer=str(row[answer]),
                    id=str(row.get("id", index)),
                    task=str(row.get("task", "")),
                    extra=extra,
                )
            )
        return cls(problems, name, dropped)

    @classmethod
    def from_jsonl(cls, path: str | Path, **columns: str) -> PromptSet:
        """One JSON object a line (.jsonl), or one array of objects (.json)."""
        return cls.from_rows(_read_json(Path(path)), str(path), **columns)

    @classmethod
    def from_hub(cls, name: str, split: str = "train", **columns: str) -> PromptSet:
        """A dataset of the Hugging Face hub, or a local folder that ``datasets`` can read."""
        try:
            import datasets
        except ImportError:
            raise RLKVError(f"{name}: the package datasets is missing; run `pip install datasets`") from None
        try:
            rows = datasets.load_dataset(name, split=split)
        except Exception as error:  # the hub client raises many types, all meaning "could not be read"
            raise RLKVError(
                f"{name}: could not load split {split!r}: {type(error).__name__}: {error}"
            ) from None
        return cls.from_rows(rows, f"{name}[{split}]", **columns)

    @classmethod
    def from_pocket(cls, tasks: str = "", split: str = "train", n: int = 1024, seed: int = 0) -> PromptSet:
        """``n`` problems in all of the pocket tasks joined by "+" (default: those that reason), in turn.

        split is "train", "dev" or "test".
        """
        from rlkv import pocket

        names = tasks.split("+") if tasks else list(pocket.REASONING)
        for task in names:
            if task not in pocket.TASKS:
                raise RLKVError(f"pocket: no task {task!r}; there are {', '.join(pocket.TASKS)}")
        if split not in ("train", "dev", "test"):
            raise RLKVError(f"pocket: no split {split!r}; there are train, dev, test")
        share = -(-n // len(names))
        lists = [pocket.problems(task, split, share, seed=seed) for task in names]
        rows = [row for group in zip(*lists, strict=True) for row in group][:n]
        return cls.from_rows(rows, f"pocket:{'+'.join(names)}[{split}]")

    @classmethod
    def from_spec(cls, spec: str, split: str, n: int = 0, seed: int = 0, **columns: str) -> PromptSet:
        """``spec`` as in the module's docstring; ``n`` problems at most (0: all; 1024 of the pocket's)."""
        if not spec:
            raise RLKVError("data: no prompt set is named; give a .jsonl path, a hub id or pocket:TASKS")
        if spec == "pocket" or spec.startswith("pocket:"):
            return cls.from_pocket(spec.partition(":")[2], split, n or 1024, seed)
        if spec.endswith((".jsonl", ".json")):
            found = cls.from_jsonl(spec, **columns)
        else:
            found = cls.from_hub(spec, split, **columns)
        return cls(found.problems[:n] if n else found.problems, found.name, found.dropped)

    def encode(
        self,
        tokenizer: Any,
        max_tokens: int,
        say: Callable[[str], None] = print,
        limit: str = "max_prompt_tokens",
    ) -> Encoded:
        """Tokens through the chat template: one user message and the generation prompt.

        Prompts of more than ``max_tokens`` tokens are left out, and ``say`` is told how many. RLKVError when
        none is left or the tokenizer has no chat template. ``limit`` says where ``max_tokens`` comes from.
        """
        encoded = Encoded([], [], [])
        longest = 0
        for problem in self.problems:
            tokens, thinking = chat_tokens(tokenizer, problem.prompt)
            longest = max(longest, len(tokens))
            if len(tokens) > max_tokens:
                encoded.skipped += 1
                continue
            encoded.problems.append(problem)
            encoded.tokens.append(tokens)
            encoded.thinking.append(thinking)
        if not encoded.problems:
            raise RLKVError(
                f"{self.name}: all {encoded.skipped} prompts are longer than {max_tokens} tokens, the limit "
                f"by {limit} (the longest has {longest})"
            )
        if self.dropped:
            say(f"{self.name}: SKIPPED {self.dropped} rows with an empty prompt or answer")
        if encoded.skipped:
            say(
                f"{self.name}: SKIPPED {encoded.skipped} of {len(self.problems)} prompts longer than "
                f"{max_tokens} tokens (the longest has {longest})"
            )
        return encoded


def chat_tokens(tokenizer: Any, prompt: str) -> tuple[list[int], bool]:
    """Tokens of one user message and the generation prompt, and whether they leave a thought open.

    RLKVError when the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise RLKVError("the tokenizer has no chat template; set tokenizer.chat_template")
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens, text.rfind("<think>") > text.rfind("</think>")


def _read_json(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise RLKVError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RLKVError(
            f"{path}: not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x})"
        ) from None
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise RLKVError(f"{path}: line {error.lineno} is not valid JSON: {error.msg}") from None
        if not isinstance(rows, list):
            raise RLKVError(f"{path}: expected a JSON array of objects")
        numbered = list(enumerate(rows, 1))
    else:
        lines = enumerate(text.split("\n"), 1)
        numbered = [(number, _line(path, number, line)) for number, line in lines if line.strip()]
    for number, row in numbered:
        if not isinstance(row, dict):
            raise RLKVError(f"{path}: line {number} is not a JSON object")
    return [row for _, row in numbered]


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise RLKVError(f"{path}: line {number} is not valid JSON: {error.msg}") from None
