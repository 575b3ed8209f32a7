"""Single-head ablation: what is lost when one KV head alone is made local.

The baseline that RLKV must beat: it sees each head by itself, and misses heads that stand in for each other.
"""

from __future__ import annotations

import hashlib
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlkv.answers import answer_masks, identity, read_rows
from rlkv.attention import Mixed
from rlkv.config import check_same, read_yaml
from rlkv.config import save as save_config
from rlkv.data import Encoded
from rlkv.errors import RLKVError
from rlkv.gates import HeadGates
from rlkv.logprobs import check_head, response_logprobs
from rlkv.rewards import grade
from rlkv.rollout import answer_text
from rlkv.sampler import Sampler, SamplingParams

if TYPE_CHECKING:
    from rlkv.bench import Bench

TOKENS_A_FORWARD = 8192


def ablate(bench: Bench, folder: Path, used: bool = False) -> HeadGates:
    """Scores of all heads by rank, in [0, 1]: 1 for the head whose loss hurts most. Saved in ``folder``.

    Heads are ranked by the accuracy lost on development problems with that head alone local; equal losses
    (most, near the top) by the log-probability lost on the full cache's own right answers. Work in ``folder``
    is used again; RLKVError if it was done on other problems or with other settings.
    ``used``: masks of these scores are answered, so that no others will do.
    """
    table = folder / "gates.tsv"
    if used and not table.is_file():
        raise RLKVError(
            f"{table}: no such head scores, but their masks have answers in {folder.parent / 'rows.jsonl'}: "
            "put them back, or choose another output"
        )
    config = bench.config
    if bench.source(config.ablation_data, config.ablation_split) == bench.source(config.data, config.split):
        raise RLKVError(
            "ablation must score heads on other problems than those reported: give ablation_data=…"
        )
    prompts = bench.problems(config.ablation_data, config.ablation_split, config.ablation_problems)
    record(depends(bench, prompts), folder, used)
    if table.is_file():
        return HeadGates.load(folder, model=bench.model)
    return score_heads(bench, bench.sampler(prompts), prompts, folder)


def depends(bench: Bench, prompts: Encoded) -> dict[str, Any]:
    """What the scores depend on."""
    settings = bench.settings
    problems = [(identity(problem.task, problem.id), problem.digest) for problem in prompts.problems]
    digest = hashlib.sha256(repr(problems).encode()).hexdigest()[:12]
    return {
        "model": settings.model,
        "dtype": settings.dtype,
        "window": str(settings.window),
        "prefill": settings.prefill,
        "reward": settings.reward,
        "max_new_tokens": settings.max_new_tokens,
        "development problems": f"{len(prompts)} (digest {digest})",
    }


def record(settings: dict[str, Any], folder: Path, used: bool) -> None:
    """Write ``settings`` into ``folder``; RLKVError if what is scored there was scored with others."""
    path = folder / "settings.yaml"
    advice = "choose another output" + ("" if used else f", or delete {folder}")
    if (folder / "gates.tsv").is_file() or read_rows(folder / "rows.jsonl"):
        if not path.is_file():
            raise RLKVError(f"{folder} holds head scores without {path.name}, of unknown settings: {advice}")
        check_same(read_yaml(path), settings, f"{folder} holds head scores", advice)
    save_config(settings, path)


def score_heads(bench: Bench, sampler: Sampler, prompts: Encoded, folder: Path) -> HeadGates:
    """:func:`ablate` on the problems given; answers in ``folder`` are used again, gates written over."""
    config = bench.config
    layers, heads = bench.shape.layers, bench.shape.kv_heads
    print(f"ablation: {layers * heads} heads x {len(prompts)} problems")
    solved = solve(bench, sampler, prompts)
    if not solved:
        raise RLKVError(
            f"ablation: the full cache solves none of {len(prompts)} problems, so nothing can be lost: give "
            "easier ones, or a higher max_new_tokens"
        )
    singles = {
        f"head-{layer}-{head}": one_local(layers, heads, layer, head) for layer, head in pairs(layers, heads)
    }
    rows = answer_masks(
        folder / "rows.jsonl",
        sampler,
        bench.tokenizer,
        prompts,
        singles,
        bench.reward,
        max_new_tokens=config.max_new_tokens,
        chunk=config.chunk,
    )
    right = torch.tensor([sum(row.score for row in rows[name]) for name in singles]).reshape(layers, heads)
    likelihood = single_head_logprobs(bench, list(solved.values()))
    scores = rank_scores(-right, -likelihood)
    gates = HeadGates(scores, window=bench.window, model=bench.shape)
    gates.save(
        folder,
        method="single-head ablation",
        problems=len(prompts),
        solved_by_full=len(solved),
        accuracy=(right / len(prompts)).tolist(),
        logprob=likelihood.tolist(),
    )
    return gates


def solve(bench: Bench, sampler: Sampler, prompts: Encoded) -> dict[str, tuple[list[int], list[int]]]:
    """Problem -> (prompt tokens, tokens of the full cache's answer), for the right answers."""
    params = SamplingParams(max_new_tokens=bench.config.max_new_tokens, temperature=0.0)
    solved = {}
    for number, done in enumerate(sampler.generate(prompts.tokens, params)):
        problem = prompts.problems[number]
        text = answer_text(bench.tokenizer, done, prompts.thinking[number])
        if grade(bench.reward, text, problem, done.finish).score == 1:
            solved[identity(problem.task, problem.id)] = (prompts.tokens[number], done.tokens)
    return solved


@torch.inference_mode()
def single_head_logprobs(bench: Bench, answers: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """float64 [layers, kv_heads]: mean log-probability of a token of ``answers``, each head alone local.

    ``answers``: (prompt tokens, answer tokens). Teacher-forced, the prompt windowed too. Several heads
    share a forward, as rows with gates of their own.
    """
    check_head(bench.model)
    layers, heads = bench.shape.layers, bench.shape.kv_heads
    total = torch.zeros(layers * heads, dtype=torch.float64)
    for prompt, answer in answers:
        rows = max(1, TOKENS_A_FORWARD // (len(prompt) + len(answer)))
        where = list(pairs(layers, heads))
        for start in range(0, len(where), rows):
            part = where[start : start + rows]
            gates = torch.stack([one_local(layers, heads, *pair) for pair in part]).to(bench.model.device)
            mixed = Mixed(gates, bench.window)
            found = response_logprobs(bench.model, [(prompt, answer)] * len(part), 1.0, rlkv=mixed)
            total[start : start + len(part)] += found.reshape(len(part), -1).double().sum(1).cpu()
    return (total / sum(len(answer) for _, answer in answers)).reshape(layers, heads)


def pairs(layers: int, heads: int) -> product[tuple[int, int]]:
    """(layer, head), row by row."""
    return product(range(layers), range(heads))


def one_local(layers: int, heads: int, layer: int, head: int) -> torch.Tensor:
    """Gates [layers, heads] of ones with a single 0."""
    gates = torch.ones(layers, heads)
    gates[layer, head] = 0
    return gates


def rank_scores(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """float32 in [0, 1], same shape: rank by ``first``, then ``second``; 1 is the highest, equals share."""
    keys = list(zip(first.flatten().tolist(), second.flatten().tolist(), strict=True))
    ranks = {key: rank for rank, key in enumerate(sorted(set(keys)))}
    top = max(len(ranks) - 1, 1)
    return torch.tensor([ranks[key] / top for key in keys]).reshape(first.shape)
