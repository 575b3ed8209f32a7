"""Answers to prompts under the current gates, graded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlkv.data import Encoded
from rlkv.learner import Sample, task_rewards
from rlkv.paged import PagedSampler
from rlkv.rewards import Reward, Verdict, grade
from rlkv.sampler import Completion, Sampler, SamplingParams
from rlkv.settings import TrainConfig


@dataclass
class Actor:
    """Answers the prompts of one set and grades the answers."""

    sampler: Sampler | PagedSampler
    tokenizer: Any
    prompts: Encoded
    reward: Reward

    def answer(
        self, which: Sequence[int], params: SamplingParams, gates: torch.Tensor | None, samples: int = 1
    ) -> list[list[Sample]]:
        """[len(which)][samples] graded answers to the prompts numbered ``which``.

        gates: [layers, kv_heads], or [len(which) * samples, layers, kv_heads].
        """
        asked = [index for index in which for _ in range(samples)]
        prompts = [self.prompts.tokens[index] for index in asked]
        completions = self.sampler.generate(prompts, params, gates)
        graded = [
            Sample(
                self.prompts.tokens[index],
                done.tokens,
                done.logprobs,
                self.verdict(index, done),
                self.prompts.problems[index].task,
            )
            for index, done in zip(asked, completions, strict=True)
        ]
        return [graded[start : start + samples] for start in range(0, len(graded), samples)]

    def verdict(self, index: int, completion: Completion) -> Verdict:
        """Grade one completion of prompt number ``index``."""
        text = answer_text(self.tokenizer, completion, self.prompts.thinking[index])
        return grade(self.reward, text, self.prompts.problems[index], completion.finish)


def make_sampler(model: Any, config: TrainConfig, max_length: int) -> Sampler | PagedSampler:
    """The sampler that ``config`` asks for, with room for ``max_length`` tokens a request."""
    common: dict[str, Any] = {"slots": config.slots, "max_length": max_length, "prefill": config.prefill}
    if config.kv_gib:
        pages = int(config.kv_gib * 2**30)  # their memory is the update's in between
        return PagedSampler(model, config.window, kv_bytes=pages, release=True, **common)
    return Sampler(model, config.window, **common)


def answer_text(tokenizer: Any, completion: Completion, thinking: bool) -> str:
    """The text without the stop token; special tokens stay, for ``</think>`` is one in some vocabularies."""
    tokens = completion.tokens[:-1] if completion.finish == "stop" else completion.tokens
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    return f"<think>{text}" if thinking else text


def summary(samples: list[list[Sample]]) -> dict[str, float]:
    """Reward, how answers ended, and lengths in tokens."""
    flat = [sample for group in samples for sample in group]
    kinds = Counter(sample.verdict.kind for sample in flat)
    scores = [sum(sample.verdict.score for sample in group) / len(group) for group in samples]
    count = len(flat)
    tasks = task_rewards(samples)
    by_task = {f"reward_{task}": reward for task, reward in tasks.items()} if len(tasks) > 1 else {}
    return {
        "reward": sum(scores) / len(scores),
        "solved": sum(score >= 1 for score in scores) / len(scores),  # prompts with every sample right
        "mixed": sum(0 < score < 1 for score in scores) / len(scores),
        "truncated": kinds["truncated"] / count,
        "no_answer": kinds["no_answer"] / count,
        "grader_errors": kinds["error"],
        "response_length": sum(len(sample.response) for sample in flat) / count,
        **by_task,
    }
