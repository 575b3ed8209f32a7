"""Does the pocket reasoner show the phenomenon? Held-out greedy accuracy, with the thought and without.

    python -m rlkv.pocket.check n=1024 output=docs/results/pocket

The full cache must solve every task, local heads alone (window 4 + 16) must not, nor an answer without a
thought; recall needs no thought, and loses with local heads what retrieval needs.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rlkv import pocket
from rlkv.cli import script
from rlkv.files import write_atomically
from rlkv.loading import load_model
from rlkv.sampler import Sampler, SamplingParams
from rlkv.statistics import wilson

ARMS = ("full cache", "all heads local", "full cache, no thought")


@dataclass
class CheckConfig:
    """``python -m rlkv.pocket.check key=value ...``"""

    n: int = 1024  # held-out problems of each task
    output: Path = Path("runs/pocket-check")  # folder for phenomenon.json and phenomenon.md
    split: str = "test"  # train, dev or test
    slots: int = 64  # answers written at the same time
    max_new_tokens: int = 512  # of an answer
    device: str = "auto"  # auto, cpu, cuda, ...


def check(config: CheckConfig) -> list[dict[str, Any]]:
    """One row for each task and arm: accuracy with its 95 % interval, mean tokens of the answer."""
    model, tokenizer = load_model("pocket", "float32", config.device)
    sampler = Sampler(model, pocket.WINDOW, slots=config.slots, max_length=320 + config.max_new_tokens)
    local = torch.zeros(model.config.num_hidden_layers, model.config.num_key_value_heads)
    params = SamplingParams(max_new_tokens=config.max_new_tokens, temperature=0.0)
    rows = []
    for task in pocket.TASKS:
        problems = pocket.problems(task, config.split, config.n)
        for arm in ARMS:
            texts = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": problem["prompt"]}],
                    tokenize=False,
                    add_generation_prompt=True,
                    enable_thinking=arm != ARMS[2],
                )
                for problem in problems
            ]
            prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            answers = sampler.generate(prompts, params, local if arm == ARMS[1] else None)
            right = 0
            for text, answer, problem in zip(texts, answers, problems, strict=True):
                said = (text + tokenizer.decode(answer.tokens)).rpartition("</think>")[2]
                right += said == f"\\boxed{{{problem['answer']}}}<eos>"
            tokens = sum(len(answer.tokens) for answer in answers) / len(answers)
            accuracy = asdict(wilson(right, len(problems)))
            rows.append(
                {"task": task, "arm": arm, "n": len(problems), "accuracy": accuracy, "tokens": tokens}
            )
            print(f"{task:8} {arm:24} {100 * accuracy['value']:5.1f} %  {tokens:4.0f} tokens", flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each task, a column for each arm."""
    lines = [f"| task | {' | '.join(ARMS)} | tokens of a full-cache answer |", "|---" * (len(ARMS) + 2) + "|"]
    for task in pocket.TASKS:
        found = [row for row in rows if row["task"] == task]
        cells = [
            f"{100 * row['accuracy']['value']:.1f} "
            f"[{100 * row['accuracy']['low']:.1f}, {100 * row['accuracy']['high']:.1f}]"
            for row in found
        ]
        lines.append(f"| {task} | {' | '.join(cells)} | {found[0]['tokens']:.0f} |")
    return "\n".join(lines) + "\n"


def run(config: CheckConfig) -> None:
    """Check, and write what was found."""
    rows = check(config)
    config.output.mkdir(parents=True, exist_ok=True)
    write_atomically(config.output / "phenomenon.json", json.dumps(rows, indent=2) + "\n")
    write_atomically(config.output / "phenomenon.md", table(rows))


if __name__ == "__main__":
    sys.exit(script("python -m rlkv.pocket.check", __doc__.splitlines()[0], CheckConfig, run))
