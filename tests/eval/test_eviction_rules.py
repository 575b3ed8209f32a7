"""Each token-dropping method against its rule, written plainly in float64 over explicit sets of tokens."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from eviction_judge import Forward, Trial, run
from tiny_models import VOCABULARY, tiny

from rlkv.window import Window
from rlkv_eval.methods.base import token_budget

WINDOW = Window(3, 9)
RAGGED = [1, 5, 60, 2, 11, 12, 13, 33, 70, 3]  # below, at and far above the window of 12
TOLERANCE = 2e-6  # scores are float32


def make_prompts(lengths: list[int] = RAGGED) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def heads_of(trial: Trial) -> list[tuple[int, int]]:
    shape = trial.context.shape
    return [(layer, head) for layer in range(shape.layers) for head in range(shape.kv_heads)]


def best(scores: dict[int, float], kept: set[int]) -> bool:
    """Whether the kept tokens are those of highest score."""
    dropped = scores.keys() - kept
    return (
        not dropped or not kept or min(scores[k] for k in kept) >= max(scores[d] for d in dropped) - TOLERANCE
    )


# --- H2O ---


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize(("sparsity", "recent"), [(0.5, 0.5), (7 / 9, 0.25)])
def test_h2o_drops_the_token_of_least_attention(kind: str, sparsity: float, recent: float) -> None:
    model = tiny(kind)
    trial = run(model, "h2o", sparsity, make_prompts(), window=WINDOW, slots=4, new_tokens=40, recent=recent)
    sparsity = 1 - round((1 - sparsity) * 9) / 9  # of whole heads: 3 layers of 3
    decisions = 0
    for request, prompt in enumerate(trial.prompts):
        held, _, slow = trial.judged(request)
        for layer, head in heads_of(trial):
            for length in range(len(prompt), len(prompt) + len(trial.completions[request].tokens)):
                now, budget = set(held[length][layer][head]), token_budget(length, sparsity, WINDOW)
                assert len(held[length][layer][head]) == len(now) == budget
                newest = set(range(length - int(budget * recent), length))
                assert newest <= now
                in_prompt = length == len(prompt)
                before = set(range(length)) if in_prompt else set(held[length - 1][layer][head])
                queries = length if in_prompt else length - 1  # whose attention is known by then
                drawn = slow.weights[layer][2 * head : 2 * head + 2, :queries].sum((0, 1))
                candidates = {token: float(drawn[token]) for token in before - newest}
                assert best(candidates, (now - newest) & candidates.keys())
                decisions += len(candidates.keys() - now)
    assert decisions > 500


# --- R-KV ---


def rkv_turns(sparsity: float, observed: int, buffer: int, share: float) -> dict[int, int]:
    """Lengths at which the cache is full and must be cut, each with the tokens since the last cut."""
    length = 1
    while token_budget(length + 1, sparsity, WINDOW) == length + 1:
        length += 1
    turns = {length: length}
    while length < 200:
        budget = token_budget(length, sparsity, WINDOW)
        turn = max(1, min(buffer, int(budget * share)), min(observed, budget // 2))
        length += turn
        turns[length] = turn
    return turns


def rkv_scores(
    slow: Forward, layer: int, head: int, cells: list[int], length: int, watching: int
) -> dict[int, float]:
    """mix * importance - (1 - mix) * redundancy of the tokens before the ``watching`` last, cell by cell."""
    keys = slow.keys[layer][head][cells]
    queries = slow.queries[layer][2 * head : 2 * head + 2, length - watching : length]
    past = len(cells) - watching
    if past <= 0:
        return {}
    logits = (queries @ keys[:past].T / keys.shape[1] ** 0.5).amax(0)  # over the query heads of a group
    mean = logits.softmax(-1).mean(0)
    pooled = [float(mean[max(0, cell - 3) : cell + 4].max()) for cell in range(past)]
    unit = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
    similarity = unit @ unit.T
    for cell in range(len(cells)):
        similarity[cell, cell] = 0
    for cell in range(len(cells)):
        alike = [other for other in range(len(cells)) if similarity[cell, other] > 0.5]
        similarity[cell, max(alike, default=0)] = 0
    redundancy = similarity.mean(0).softmax(0)
    return {cells[cell]: 0.1 * pooled[cell] - 0.9 * float(redundancy[cell]) for cell in range(past)}


@pytest.mark.parametrize(("kind", "sparsity", "observed"), [("llama", 5 / 9, 4), ("qwen3", 7 / 9, 8)])
def test_rkv_keeps_what_matters_and_does_not_repeat(kind: str, sparsity: float, observed: int) -> None:
    settings: dict[str, Any] = {"observed": observed, "buffer": 16, "share": 0.25}
    trial = run(
        tiny(kind), "rkv", sparsity, make_prompts(), window=WINDOW, slots=4, new_tokens=60, **settings
    )
    turns = rkv_turns(sparsity, observed, 16, 0.25)
    cuts = 0
    for request, prompt in enumerate(trial.prompts):
        held, sees, slow = trial.judged(request)
        for length in range(len(prompt), len(prompt) + len(trial.completions[request].tokens)):
            budget = token_budget(length, sparsity, WINDOW)
            in_prompt = length == len(prompt)
            watching = min(observed, length if in_prompt else turns.get(length, 0))
            for layer, head in heads_of(trial):
                now = held[length][layer][head]
                cells = list(range(length)) if in_prompt else sees[length][layer][head]
                assert len(cells) <= budget or in_prompt  # also while the newest token is seen
                assert len(now) <= budget
                if len(now) == len(cells):
                    assert now == cells
                    assert in_prompt or length not in turns or len(prompt) > length - observed
                    continue
                assert in_prompt or length in turns
                scores = rkv_scores(slow, layer, head, cells, length, watching)
                newest = set(cells[-watching:])
                assert set(now) <= set(cells) and (newest <= set(now) or set(now) <= newest)
                assert best(scores, set(now) - newest)
                cuts += 1
    assert cuts > 150


def test_rkv_fills_its_budget_before_each_cut() -> None:
    prompts = make_prompts([30])
    trial = run(tiny("qwen3"), "rkv", 4 / 9, prompts, window=WINDOW, slots=1, new_tokens=100)
    _, sees, _ = trial.judged(0)
    turns = [length for length in rkv_turns(4 / 9, 8, 128, 0.125) if 40 < length < 130]
    assert len(turns) > 5
    for length in turns:
        assert len(sees[length][0][0]) == token_budget(length, 4 / 9, WINDOW)


# --- StreamingLLM ---


def test_streaming_keeps_sink_and_recent() -> None:
    trial = run(tiny("qwen2"), "streaming", 5 / 9, make_prompts(), window=WINDOW, slots=3, new_tokens=40)
    for request, prompt in enumerate(trial.prompts):
        held, _, _ = trial.judged(request)
        for length in range(len(prompt), len(prompt) + 40):
            budget = token_budget(length, 5 / 9, WINDOW)
            tokens = range(length)
            expected = [*tokens[:3], *tokens[3:][-(budget - 3) :]] if budget < length else [*tokens]
            for layer, head in heads_of(trial):
                assert sorted(held[length][layer][head]) == expected


# --- random eviction ---


def test_random_eviction_keeps_recent_tokens_then_the_prompt() -> None:
    sparsity = 4 / 9
    trial = run(
        tiny("llama"), "random_eviction", sparsity, make_prompts(), window=WINDOW, slots=3, new_tokens=50
    )
    for request, prompt in enumerate(trial.prompts):
        held, _, _ = trial.judged(request)
        sets: Counter[tuple[int, ...]] = Counter()
        for length in range(len(prompt), len(prompt) + 50):
            budget = token_budget(length, sparsity, WINDOW)
            for layer, head in heads_of(trial):
                now = set(held[length][layer][head])
                before = set(range(length)) if length == len(prompt) else set(held[length - 1][layer][head])
                assert len(held[length][layer][head]) == len(now) == budget
                assert set(range(max(0, length - 8), length)) <= now
                if any(token < len(prompt) for token in before - now):  # then nothing else could go
                    assert all(token < len(prompt) or token >= length - 8 for token in before)
                if length == len(prompt) + 49:
                    sets[tuple(sorted(now))] += 1
        assert len(sets) == 9  # each head draws for itself


def test_random_eviction_is_uniform() -> None:
    """In one run of one request many heads draw: every old token of the completion goes equally often."""
    model = tiny(
        "llama",
        hidden_size=64,
        num_hidden_layers=8,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=4,
    )
    prompts = make_prompts([6] * 6)
    trial = run(
        model, "random_eviction", 0.5, prompts, window=Window(2, 20), slots=6, new_tokens=20, recent=4
    )
    first = next(n for n in range(7, 30) if token_budget(n, 0.5, Window(2, 20)) < n)
    gone: Counter[int] = Counter()
    for request in range(6):
        for layer, head in heads_of(trial):
            gone.update(set(range(first)) - set(trial.record.held[request][first][layer][head]))
    draws = 6 * 8 * 32
    assert sum(gone.values()) == draws and set(gone) == set(range(6, first - 4))
    expected = draws / len(gone)
    chi_squared = sum((count - expected) ** 2 / expected for count in gone.values())
    assert chi_squared < 3 * len(gone)  # 12 degrees of freedom: 36 has a chance of 3 in 10,000


def test_random_eviction_draws_belong_to_the_request_and_the_seed() -> None:
    model, prompts = tiny("llama"), make_prompts([20, 9, 31, 14])
    options: dict[str, Any] = {"window": WINDOW, "new_tokens": 30}
    one = run(model, "random_eviction", 5 / 9, prompts, slots=1, **options)
    four = run(model, "random_eviction", 5 / 9, prompts, slots=4, **options)
    other = run(model, "random_eviction", 5 / 9, prompts, slots=4, seed=1, **options)
    for request in range(4):
        for length, held in one.record.held[request].items():
            assert [[sorted(h) for h in layer] for layer in held] == [
                [sorted(h) for h in layer] for layer in four.record.held[request][length]
            ]
    assert one.record.held[0][20] != other.record.held[0][20]
