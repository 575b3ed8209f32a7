"""Prompts through the model: their keys and values into pages, and the state after their last token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlkv.paged.cache import PagedCache
from rlkv.paged.state import Job, Run


def prefill(
    model: Any,
    cache: PagedCache,
    table: torch.Tensor,
    run: Run,
    jobs: Sequence[Job],
    slots: dict[int, int],
    budget: int,
) -> dict[int, torch.Tensor]:
    """The last final hidden state [width] of each job, by its index.

    Jobs of like length go together, at most ``budget`` padded tokens at a time (a longer one goes alone).
    ``table``: of all slots, with pages for each job's tokens; ``slots``: slot of each job, by index.
    """
    result: dict[int, torch.Tensor] = {}
    todo = sorted(jobs, key=lambda job: len(job.tokens))
    while todo:
        size = max(1, budget // len(todo[-1].tokens))
        todo, part = todo[:-size], todo[-size:]
        last = _batch(model, cache, table, run, part, [slots[job.index] for job in part])
        result |= {job.index: row for job, row in zip(part, last, strict=True)}
    return result


def _batch(
    model: Any, cache: PagedCache, table: torch.Tensor, run: Run, jobs: list[Job], slots: list[int]
) -> torch.Tensor:
    """[jobs, width]"""
    device = table.device

    def tensor(values: list[Any]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    lengths = tensor([len(job.tokens) for job in jobs])
    longest = max(len(job.tokens) for job in jobs)
    gates = run.gates_of([job.index for job in jobs])
    full = gates == 1 if run.hard and gates is not None else None
    prompt_gates, ungated = gates, None
    if cache.prefill == "full":  # gates begin after the prompt: with what a job wrote before it had to wait
        fresh = all(len(job.tokens) == job.prompt for job in jobs)
        prompt_gates = None if fresh else gates
        ungated = tensor([job.prompt for job in jobs])
    cache.prompt(table[:, tensor(slots)], lengths, full, prompt_gates, ungated)
    output = model.base_model(
        input_ids=tensor([job.tokens + [0] * (longest - len(job.tokens)) for job in jobs]),
        position_ids=torch.arange(longest, device=device).expand(len(jobs), -1),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return output[torch.arange(len(jobs), device=device), lengths - 1]
