"""Soft-max over a vocabulary: log-probabilities, probabilities and draws of plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from kernel_kit import DEVICE

pytest.importorskip("triton")
from rlkv import sampling  # noqa: E402
from rlkv.kernels.vocabulary import chosen_softmax_, draw  # noqa: E402
from rlkv.sampling import SamplingParams, choose, request_keys  # noqa: E402

MIX = (sampling._STEP, sampling._MIX_1, sampling._MIX_2)


@pytest.mark.parametrize("width", [50, 4096, 9001])
@pytest.mark.parametrize("keep", [False, True])
def test_chosen_softmax(width: int, keep: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, width, device=DEVICE) * 4
    tokens = torch.randint(0, width, (5,), device=DEVICE)
    right = torch.log_softmax(logits.double() / 0.7, -1)
    before = logits.clone()
    found = chosen_softmax_(logits, tokens, 0.7, keep)
    torch.testing.assert_close(found.double(), right.gather(1, tokens[:, None])[:, 0], atol=1e-5, rtol=1e-5)
    if keep:
        slope = torch.nn.functional.one_hot(tokens, width) - right.exp()
        torch.testing.assert_close(logits.double(), slope, atol=1e-6, rtol=1e-4)
    else:
        assert logits.equal(before)


@pytest.mark.parametrize(("width", "temperature"), [(50, 1.0), (9001, 0.6)])
def test_draws_are_those_of_choose(width: int, temperature: float) -> None:
    torch.manual_seed(1)
    count = 300 if DEVICE == "cuda" else 40
    logits = torch.randn(count, width) * 3
    logits[:, ::3] = -torch.inf  # excluded tokens never come
    keys, counts = request_keys(7, torch.arange(count)), torch.arange(count) % 5
    wanted = choose(logits, SamplingParams(temperature=temperature), keys, counts)
    tokens, logprobs = draw(logits.to(DEVICE), keys.to(DEVICE), counts.to(DEVICE), temperature, MIX)
    same = tokens.cpu() == wanted[0]  # a draw within rounding of a boundary may go the other way
    assert same.float().mean() > 0.99 and (tokens % 3 != 0).all()
    torch.testing.assert_close(logprobs.cpu()[same], wanted[1][same], atol=1e-5, rtol=1e-5)


def test_nan_logits_give_nan_and_a_token() -> None:
    logits = torch.randn(2, 5000, device=DEVICE)
    logits[1, 4500] = torch.nan
    keys = torch.arange(2, device=DEVICE)
    tokens, logprobs = draw(logits, keys, keys, 1.0, MIX)
    assert logprobs[0].isfinite() and logprobs[1].isnan()
    assert ((tokens >= 0) & (tokens < 5000)).all()
