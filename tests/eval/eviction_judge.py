"""An independent judge of token dropping: one float64 forward, where each query sees an explicit set of keys.

The sets are read from the cache's tables after every step; the judge knows nothing else of the cache.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface

from rlkv.sampler import Completion, SamplingParams
from rlkv.window import Window
from rlkv_eval.methods.base import Context, get_method

Held = list[list[list[int]]]  # positions, by layer and KV head


@dataclass
class Record:
    """What each request held after each of its steps: ``held[request][length in tokens]``."""

    held: dict[int, dict[int, Held]] = field(default_factory=dict)

    def __call__(self, cache: Any, owners: dict[int, int]) -> None:
        for slot, request in owners.items():
            length, count = int(cache.ledger.length[slot]), int(cache.ledger.held[slot])
            held = [table[slot, :, :count].tolist() for table in cache.positions]
            self.held.setdefault(request, {})[length] = held


@dataclass
class Forward:
    """Of one request: queries [Hq, T, D], keys [H, T, D], weights [Hq, T, T] by layer; logprobs [T - 1]."""

    queries: list[torch.Tensor]
    keys: list[torch.Tensor]
    weights: list[torch.Tensor]
    logprobs: torch.Tensor


_visible: list[torch.Tensor] = []
_seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []


def _attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
    groups = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    visible = _visible[module.layer_idx].repeat_interleave(groups, 0)
    scores = (query @ keys.transpose(2, 3) * scaling).masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1)
    _seen.append((query[0], key[0], weights[0]))
    return (weights @ values).transpose(1, 2), None


AttentionInterface.register("eviction_judge", _attention)


@torch.no_grad()
def forward(model: Any, tokens: list[int], prompt: int, sees: dict[int, Held]) -> Forward:
    """``sees[n]``: what the query of token n - 1 saw; queries of the prompt see all before them."""
    slow = copy.deepcopy(model).cpu().double()
    slow.set_attn_implementation("eviction_judge")
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    count = len(tokens)
    visible = torch.ones(count, count, dtype=torch.bool).tril().repeat(layers, heads, 1, 1)
    for length in range(prompt + 1, count + 1):
        visible[:, :, length - 1] = False
        for layer in range(layers):
            for head in range(heads):
                visible[layer, head, length - 1, sees[length][layer][head]] = True
    _visible[:] = visible
    _seen.clear()
    logits = slow(torch.tensor([tokens]), use_cache=False).logits[0]
    logprobs = logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(tokens)[1:, None])[:, 0]
    queries, keys, weights = (list(part) for part in zip(*_seen, strict=True))
    return Forward(queries, keys, weights, logprobs)


@dataclass
class Trial:
    """Generated with a method, and what was held meanwhile."""

    context: Context
    generator: Any
    prompts: list[list[int]]
    completions: list[Completion]
    record: Record

    def judged(self, request: int) -> tuple[dict[int, Held], dict[int, Held], Forward]:
        """(what was held after each length, what each query saw, the slow forward), for one request.

        Checks the log-probabilities on the way.
        """
        prompt, completion = self.prompts[request], self.completions[request]
        held = self.record.held[request]
        tokens = prompt + completion.tokens[:-1]  # the last token is never fed back
        sees = {}
        for length in range(len(prompt) + 1, len(tokens) + 1):
            sees[length] = [
                # a token that comes in is seen with those kept before, unless one of these made room for it
                [
                    sorted({*now, *before, length - 1}) if self.generator.plan.buffered else now
                    for now, before in zip(*layer, strict=True)
                ]
                for layer in zip(held[length], held[length - 1], strict=True)
            ]
        slow = forward(
            self.context.model,
            tokens + completion.tokens[-1:],
            len(prompt),
            sees | {len(tokens) + 1: [[[0]] * self.context.shape.kv_heads] * self.context.shape.layers},
        )
        mine = torch.tensor(completion.logprobs, dtype=torch.float64)
        torch.testing.assert_close(mine, slow.logprobs[len(prompt) - 1 :], atol=2e-4, rtol=0)
        return held, sees, slow


def run(
    model: Any,
    method: str,
    sparsity: float,
    prompts: list[list[int]],
    *,
    window: Window,
    slots: int,
    new_tokens: int,
    max_length: int = 160,
    seed: int = 0,
    **settings: Any,
) -> Trial:
    context = Context(model, None, window, "full", slots, max_length, seed, None, [], Path())
    generator: Any = get_method(method, settings).build(context, sparsity)
    generator.observer = record = Record()
    params = SamplingParams(max_new_tokens=new_tokens, temperature=1.0, seed=3)
    return Trial(context, generator, prompts, generator.generate(prompts, params), record)
