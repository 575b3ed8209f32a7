"""Single-head ablation: a head's score is what is lost on calibration problems when it alone is local."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from rlkv.ablation import score_heads
from rlkv.bench import Bench, EvalConfig
from rlkv.data import Encoded, Problem, chat_tokens
from rlkv.errors import RLKVError
from rlkv.gates import HeadGates
from rlkv.rewards import Reward
from rlkv_eval.graders.base import grade
from rlkv_eval.methods.base import Context
from rlkv_eval.methods.heads import HeadGenerator, masked, shared_sampler
from rlkv_eval.methods.scores import cached_scores, content_digest
from rlkv_eval.tasks.base import Item, get_task


@dataclass
class Ablation:
    """Heads ranked by accuracy lost, ties by log-probability lost on the full cache's right answers.

    It costs layers * KV heads answers a problem.
    """

    problems: int = 32  # of the calibration problems, the first so many
    max_new_tokens: int = 0  # of an answer (0: the limit of the problems' own tasks)

    name: ClassVar[str] = "ablation"
    title: ClassVar[str] = "Single-head ablation"
    paper: ClassVar[str] = ""

    def build(self, context: Context, sparsity: float) -> HeadGenerator:
        """Heads whose loss hurts most full. RLKVError without calibration problems that the model solves."""
        return masked(context, self.name, self.scores(context).values, sparsity)

    def scores(self, context: Context) -> HeadGates:
        """Ranks in [0, 1], cached; the answers themselves are kept, so a killed scoring goes on."""
        items = context.calibration[: self.problems]
        if not items:
            raise RLKVError("ablation: no calibration problems to score heads on")

        limit = self.max_new_tokens or max(get_task(item.task).max_new_tokens for item in items)

        def compute(folder: Path) -> HeadGates:
            prompts = encoded(context, items)
            longest = max(map(len, prompts.tokens)) + limit
            # Not the run's max_length: scores must not depend on which task happens to be evaluated.
            room = replace(context, max_length=min(longest, context.shape.context_length or longest))
            score_heads(bench_of(context, items, limit), shared_sampler(room), prompts, folder)
            return HeadGates.load(folder)  # with the card that says what each head cost

        facts = {"prompts": content_digest([item.prompt for item in items]), "limit": limit}
        return cached_scores(context, self, compute, prefill=context.prefill, **facts)


def bench_of(context: Context, items: list[Item], max_new_tokens: int) -> Bench:
    """What ``rlkv.ablation`` stands on, with the graders of the items' tasks."""
    config = EvalConfig(
        methods=["ablation"],
        window=context.window,
        prefill=context.prefill,
        slots=context.slots,
        max_new_tokens=max_new_tokens,
        reward="exact",
    )
    bench = Bench(config, context.model, context.tokenizer)
    bench.reward = graded(items)
    return bench


def graded(items: list[Item]) -> Reward:
    """The score that each item's own grader gives; a cut answer scores 0 before it gets here."""
    by_id = {(item.task, item.id): item for item in items}
    graders = {task: get_task(task).grader for task in {item.task for item in items}}

    def reward(text: str, problem: Problem) -> float:
        item = by_id[problem.task, problem.id]
        return grade(graders[item.task], item, text, True).score

    return reward


def encoded(context: Context, items: list[Item]) -> Encoded:
    """The items' prompts as tokens."""
    found = Encoded([], [], [])
    for item in items:
        tokens, _ = chat_tokens(context.tokenizer, item.prompt)
        found.problems.append(Problem(item.prompt, item.answer, item.id, item.task))
        found.tokens.append(tokens)
        found.thinking.append(False)  # graders take the completion as it is, without an opened thought
    return found
