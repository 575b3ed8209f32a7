"""Drawing tokens: frequencies, excluded tokens, log-probabilities, and random streams."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from rlkv.errors import RLKVError
from rlkv.sampling import SamplingParams, choose, request_keys, uniform

DRAWS = 40_000
LOGITS = torch.tensor([1.0, -0.5, 2.2, 0.3, -3.0, 0.9, -1.4])


def draws(params: SamplingParams, logits: torch.Tensor = LOGITS) -> tuple[torch.Tensor, torch.Tensor]:
    keys = request_keys(params.seed, torch.arange(DRAWS) // 200)
    return choose(logits.expand(DRAWS, -1), params, keys, torch.arange(DRAWS) % 200)


def allowed(params: SamplingParams) -> dict[int, float]:
    """Probabilities after temperature, top-k and top-p, in plain Python."""
    weights = [math.exp(x / params.temperature) for x in LOGITS.tolist()]
    total = sum(weights)
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    if params.top_k:
        order = order[: params.top_k]
        total = sum(weights[token] for token in order)
    kept, mass = [], 0.0
    for token in order:
        if mass >= params.top_p:
            break
        kept.append(token)
        mass += weights[token] / total
    total = sum(weights[token] for token in kept)
    return {token: weights[token] / total for token in kept}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6, seed=1),
        SamplingParams(top_k=3, seed=2),
        SamplingParams(top_p=0.7, seed=3),
        SamplingParams(temperature=1.7, top_k=5, top_p=0.85, seed=4),
        SamplingParams(top_k=100, top_p=0.01, seed=5),
    ],
    ids=str,
)
def test_frequencies_match_and_excluded_tokens_never_come(params: SamplingParams) -> None:
    token, logprob = draws(params)
    expected = allowed(params)
    counts = torch.bincount(token, minlength=len(LOGITS)).tolist()
    assert {index for index, count in enumerate(counts) if count} <= set(expected)
    statistic = sum((counts[t] - DRAWS * p) ** 2 / (DRAWS * p) for t, p in expected.items())
    freedom = len(expected) - 1  # chi-square mean; its deviation is sqrt(2 * freedom)
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 1e-6
    # the log-probability is that of the tempered distribution over all tokens
    full = (LOGITS.double() / params.temperature).log_softmax(-1)
    torch.testing.assert_close(logprob.double(), full[token], atol=1e-5, rtol=0)


def test_greedy_takes_the_largest_at_temperature_one() -> None:
    logits = torch.randn(50, 31, generator=torch.Generator().manual_seed(0)) * 4
    token, logprob = choose(
        logits, SamplingParams(temperature=0, top_k=2, top_p=0.1), torch.zeros(50).long(), torch.arange(50)
    )
    assert torch.equal(token, logits.argmax(-1))
    torch.testing.assert_close(logprob, logits.log_softmax(-1).amax(-1))


def test_tokens_without_mass_are_never_drawn() -> None:
    logits = torch.full((200,), -torch.inf)
    logits[[3, 70, 199]] = torch.tensor([0.0, 1.0, 0.5])
    for params in (SamplingParams(), SamplingParams(top_k=50), SamplingParams(top_p=0.999)):
        token, _ = draws(params, logits)
        assert set(token.tolist()) == {3, 70, 199}


def test_largest_and_smallest_draws_stay_inside() -> None:
    keys = request_keys(0, torch.arange(1000))
    numbers = uniform(keys[:, None], torch.arange(1000)).flatten()
    assert 0 <= numbers.min() < 1e-5 and 1 - 1e-5 < numbers.max() < 1
    buckets = torch.bincount((numbers * 100).long(), minlength=100).double()
    assert ((buckets - 1e4) ** 2 / 1e4).sum() < 99 + 5 * math.sqrt(2 * 99)


def test_streams_are_splitmix64_and_differ_by_seed_request_and_count() -> None:
    with numpy.errstate(over="ignore"):

        def mix(x: numpy.uint64) -> numpy.uint64:
            u = numpy.uint64
            x = x * u(0x9E3779B97F4A7C15) + u(0x9E3779B97F4A7C15)
            x = (x ^ (x >> u(30))) * u(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> u(27))) * u(0x94D049BB133111EB)
            return x ^ (x >> u(31))

        seed, request, count = numpy.uint64(2**63 + 5), numpy.uint64(7), numpy.uint64(11)
        bits = mix(mix(mix(seed) + request) + count)
    drawn = uniform(request_keys(2**63 + 5, torch.tensor([7])), torch.tensor([11]))
    assert drawn.item() == (int(bits) >> 16) / 2**48
    streams = torch.cat(
        [
            uniform(request_keys(seed, torch.arange(50))[:, None], torch.arange(50)).flatten()
            for seed in range(4)
        ]
    )
    assert len(set(streams.tolist())) == len(streams)
    correlation = torch.corrcoef(streams.view(200, 50)).fill_diagonal_(0)
    assert correlation.abs().max() < 0.7  # 20k pairs of 50 draws: 0.7 is over 4.9 deviations of 1/7


def test_a_request_keeps_its_stream_whatever_else_is_asked_for() -> None:
    numbers = (7, 2**61 + 3, 0)
    keys = SamplingParams(seed=5, streams=numbers).keys(3)
    assert keys.equal(request_keys(5, torch.tensor(numbers)))
    assert SamplingParams(seed=5, streams=numbers[1:2]).keys(1).equal(keys[1:2])
    assert SamplingParams(seed=5).keys(3).equal(request_keys(5, torch.arange(3)))
    with pytest.raises(RLKVError, match="3 random streams for 2 requests"):
        SamplingParams(streams=numbers).keys(2)


def test_large_vocabularies_are_searched_in_two_levels_with_the_same_result() -> None:
    generator = torch.Generator().manual_seed(0)
    for vocabulary in (128 * 128 + 1, 20_000, 128 * 200):
        logits = 3 * torch.randn(300, vocabulary, generator=generator)
        logits[:, torch.rand(vocabulary, generator=generator) < 0.5] = -torch.inf
        logits[0], logits[0, vocabulary - 1] = -torch.inf, 0.0  # all mass on the last token, or on the first
        logits[1], logits[1, 0] = -torch.inf, 0.0
        keys, counts = request_keys(3, torch.arange(300)), torch.arange(300)
        token, logprob = choose(logits, SamplingParams(), keys, counts)
        total = logits.log_softmax(-1).exp().double().cumsum(-1).numpy()
        draw = uniform(keys, counts).numpy() * total[:, -1]
        expected = [int(numpy.searchsorted(row, x, side="right")) for row, x in zip(total, draw, strict=True)]
        assert token.tolist() == expected
        assert token[0] == vocabulary - 1 and token[1] == 0 and logprob.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_bad_settings_are_named(arguments: dict, word: str) -> None:
    with pytest.raises(RLKVError, match=word):
        SamplingParams(**arguments)
