"""Self-distillation sampling (paper appendix B): keep problems that the model itself solves greedily.

Every candidate is answered with the full cache; the solved ones are drawn by the length of the model's
answer, a fixed count from each bucket. ``candidates.jsonl`` gets a row as each answer ends, so a killed run
goes on where it stopped; ``train.jsonl``, ``test.jsonl`` (if held-out problems are asked for) and
``report.json`` are made from it.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlkv.config import plain
from rlkv.data import Encoded, PromptSet
from rlkv.errors import RLKVError
from rlkv.files import whole_lines, write_atomically
from rlkv.loading import load_model
from rlkv.rewards import get_reward
from rlkv.rollout import Actor
from rlkv.sampler import Completion, Sampler, SamplingParams
from rlkv.support import check_model
from rlkv.window import Window

INSTRUCTION = "{prompt}\n\nReason step by step, and put your final answer within \\boxed{}."

# What the rows of candidates.jsonl depend on.
DEPENDS = ["model", "data", "data_split", "prompt_column", "answer_column", "prompt_template", "reward"]
DEPENDS += ["max_prompt_tokens", "max_new_tokens"]


@dataclass
class CollectConfig:
    """What ``rlkv collect`` takes; lengths are in tokens."""

    model: str = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"  # hub id, local folder, or pocket
    data: str = "agentica-org/DeepScaleR-Preview-Dataset"  # hub id, .jsonl path, or pocket:TASKS
    data_split: str = "train"  # of a hub dataset or of the pocket
    output: str = "data/collected"  # folder for candidates.jsonl, train.jsonl, test.jsonl, report.json
    prompt_column: str = "problem"  # column of the question
    answer_column: str = "answer"  # column of the gold answer
    prompt_template: str = INSTRUCTION  # wraps the question
    reward: str = "math"  # math, exact or module.path:function
    max_candidates: int = 0  # answer at most so many, drawn at random (0: all)
    max_prompt_tokens: int = 512  # longer prompts are skipped, and counted
    max_new_tokens: int = 8192  # longer answers count as unsolved (what the context leaves, if less)
    bucket_edges: list[int] = field(default_factory=lambda: [0, 2048, 4096, 6144, 8192])  # of answer length
    bucket_counts: list[int] = field(
        default_factory=lambda: [600, 600, 1000, 800]
    )  # problems from each bucket
    held_out: int = 0  # further problems for test.jsonl, in the buckets' proportions
    slots: int = 32  # answers being written at the same time
    seed: int = 1  # of the draw
    dtype: str = "bfloat16"  # of the model: bfloat16 or float32
    device: str = "auto"  # auto, cpu, cuda, ...

    def check(self) -> None:
        """Raise RLKVError for a value that cannot be meant."""
        edges, counts = self.bucket_edges, self.bucket_counts
        if len(edges) != len(counts) + 1 or edges != sorted(set(edges)):
            raise RLKVError(
                f"bucket_edges must rise and be one more than bucket_counts; got {edges} and {counts}"
            )
        if min(counts) < 0 or sum(counts) == 0:
            raise RLKVError(f"bucket_counts must be 0 or more, and not all 0; got {counts}")
        if self.held_out < 0 or self.max_candidates < 0:
            raise RLKVError("held_out and max_candidates must be 0 or more")
        for name in ("max_prompt_tokens", "max_new_tokens", "slots"):
            if getattr(self, name) < 1:
                raise RLKVError(f"{name} must be 1 or more, got {getattr(self, name)}")


@dataclass
class Report:
    """Counts by bucket, in the order of ``bucket_counts``."""

    candidates: int
    solved: int
    kinds: dict[str, int]
    available: list[int]
    wanted: list[int]
    train: list[int]
    test: list[int]
    skipped_prompts: int

    @property
    def shortfall(self) -> int:
        """Problems wanted for training and not found."""
        return sum(self.wanted) - sum(self.train)


def collect(
    config: CollectConfig, model: Any = None, tokenizer: Any = None, say: Callable[[str], None] = print
) -> Report:
    """Answer what is not answered yet, then draw; returns the report, which is also written.

    Raises RLKVError for bad settings or input, for an output folder made with other settings, and when
    nothing was solved.
    """
    config.check()
    folder = Path(config.output)
    reward = get_reward(config.reward)
    rows = read_rows(folder / "candidates.jsonl")
    if rows:
        check_same_settings(config, folder)
    if model is None:
        model, tokenizer = load_model(config.model, config.dtype, config.device)
    found = PromptSet.from_spec(
        config.data,
        config.data_split,
        prompt=config.prompt_column,
        answer=config.answer_column,
        template=config.prompt_template,
    )
    prompts = found.encode(tokenizer, config.max_prompt_tokens, say)
    chosen = prompts.order(0, config.seed)[: config.max_candidates or None]
    if not all(is_candidate(row, prompts) for row in rows):
        raise RLKVError(f"{folder}: its candidates are not those of {config.data}; give another output")
    done = {row["row"] for row in rows}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "collect.json", json.dumps(depends(config), indent=2))
    left = [index for index in chosen if index not in done]
    if done:
        say(f"{len(done)} candidates are answered already, {len(left)} are left.")
    if left:
        room = check_model(model).context_length or math.inf
        longest = int(min(config.max_prompt_tokens + config.max_new_tokens, room))
        sampler = Sampler(model, Window(0, 1), slots=config.slots, max_length=longest)
        actor = Actor(sampler, tokenizer, prompts, reward)
        with (folder / "candidates.jsonl").open("a", encoding="utf-8") as file:

            def keep(completion: Completion) -> None:
                index = left[completion.index]
                problem, verdict = prompts.problems[index], actor.verdict(index, completion)
                row = {
                    "row": index,
                    "id": problem.id,
                    "prompt": problem.prompt,
                    "answer": problem.answer,
                    "task": problem.task,
                    "input_tokens": len(prompts.tokens[index]),
                    "output_tokens": len(completion.tokens),
                    "score": verdict.score,
                    "kind": verdict.kind,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                rows.append(row)
                if len(rows) % 100 == 0:
                    solved = sum(row["score"] >= 1 for row in rows)
                    say(f"{len(rows)} of {len(chosen)} answered, {solved} solved")

            params = SamplingParams(max_new_tokens=config.max_new_tokens, temperature=0.0)
            sampler.generate([prompts.tokens[index] for index in left], params, on_finish=keep)
    wanted = set(chosen)
    return draw(config, [row for row in rows if row["row"] in wanted], prompts.skipped, say)


def depends(config: CollectConfig) -> dict[str, Any]:
    """The settings that the candidates depend on."""
    return {name: plain(config)[name] for name in DEPENDS}


def check_same_settings(config: CollectConfig, folder: Path) -> None:
    """Raise RLKVError if the folder's candidates were answered with other settings."""
    path = folder / "collect.json"
    if not path.is_file():
        return
    now = depends(config)
    for name, old in json.loads(path.read_text()).items():
        if now.get(name) != old:
            raise RLKVError(
                f"{folder} was made with {name}={old!r}, now it is {now.get(name)!r}: give another output"
            )


def is_candidate(row: dict[str, Any], prompts: Encoded) -> bool:
    """Whether ``row`` answers the problem that stands in its place."""
    if row["row"] >= len(prompts):
        return False
    problem = prompts.problems[row["row"]]
    return (row["id"], row["prompt"], row["answer"]) == (problem.id, problem.prompt, problem.answer)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The complete rows so far."""
    try:
        return [json.loads(line) for line in whole_lines(path)]
    except ValueError as error:
        raise RLKVError(f"{path} holds a line that is not JSON ({error}); give another output") from None


def draw(
    config: CollectConfig, rows: list[dict[str, Any]], skipped: int, say: Callable[[str], None]
) -> Report:
    """Draw train and test rows from the solved ones, a seeded sample from each bucket; write them."""
    folder = Path(config.output)
    solved = sorted((row for row in rows if row["score"] >= 1), key=lambda row: row["row"])
    kinds = {kind: sum(row["kind"] == kind for row in rows) for kind in sorted({row["kind"] for row in rows})}
    if not solved:
        raise RLKVError(f"{config.data}: none of {len(rows)} candidates was solved ({kinds}); see {folder}")
    generator = random.Random(config.seed)
    edges, counts = config.bucket_edges, config.bucket_counts
    train: list[list[dict[str, Any]]] = []
    test: list[list[dict[str, Any]]] = []
    available = []
    for bucket, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        inside = [row for row in solved if low < row["output_tokens"] <= high]
        available.append(len(inside))
        generator.shuffle(inside)
        train.append(inside[: counts[bucket]])
        spare = inside[counts[bucket] :]
        before = round(config.held_out * sum(counts[:bucket]) / sum(counts))
        after = round(config.held_out * sum(counts[: bucket + 1]) / sum(counts))
        test.append(spare[: after - before])
        for what, got, want in (("training", train, counts[bucket]), ("held-out", test, after - before)):
            if len(got[-1]) < want:
                say(f"SHORTFALL: {len(got[-1])} of {want} {what} problems with {low}-{high} tokens of answer")
    # an earlier draw's: its problems may be in train.jsonl now
    (folder / "test.jsonl").unlink(missing_ok=True)
    write_rows(folder / "train.jsonl", (row for rows in train for row in rows))
    if config.held_out:
        write_rows(folder / "test.jsonl", (row for rows in test for row in rows))
    report = Report(
        len(rows),
        len(solved),
        kinds,
        available,
        counts,
        [len(r) for r in train],
        [len(r) for r in test],
        skipped,
    )
    record = {**plain(report), "bucket_edges": edges, "shortfall": report.shortfall, "seed": config.seed}
    write_atomically(folder / "report.json", (json.dumps(record, indent=2) + "\n").encode())
    say(f"{report.solved} of {report.candidates} solved; {sum(report.train)} in {folder / 'train.jsonl'}")
    return report


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Rows ready to train on: prompts as they were asked, so the template must not be applied again."""
    kept = ({key: row[key] for key in row if key not in ("row", "score", "kind")} for row in rows)
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept).encode())
