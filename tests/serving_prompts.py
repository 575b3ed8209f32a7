"""Prompts for tests of serving."""

from __future__ import annotations

from rlkv import pocket
from rlkv.data import chat_tokens


def pocket_prompts(count: int) -> list[list[int]]:
    """Tokens of the pocket reasoner's prompts, all tasks, some cut or doubled so that lengths differ."""
    _, tokenizer = pocket.load()
    tasks = list(pocket.TASKS)
    found = [pocket.problems(task, "test", -(-count // len(tasks))) for task in tasks]
    prompts = [chat_tokens(tokenizer, p["prompt"])[0] for group in zip(*found, strict=True) for p in group]
    lengths = (None, None, 3, 21, None, 70)
    cut = [prompt[: lengths[i % len(lengths)]] for i, prompt in enumerate(prompts[:count])]
    return [prompt * 2 if i % 11 == 0 else prompt for i, prompt in enumerate(cut)]
