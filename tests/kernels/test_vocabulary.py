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


# of what is stored: the interpreter cuts bits off where the device rounds
LAST_BIT = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def check_chosen(logits: torch.Tensor, tokens: torch.Tensor, keep: bool) -> None:
    right = torch.log_softmax(logits.double() / 0.7, -1)
    before = logits.clone()
    found = chosen_softmax_(logits, tokens, 0.7, keep)
    torch.testing.assert_close(found.double(), right.gather(1, tokens[:, None])[:, 0], atol=1e-5, rtol=1e-5)
    if keep:
        slope = torch.nn.functional.one_hot(tokens, logits.shape[1]) - right.exp()
        torch.testing.assert_close(logits.double(), slope, atol=1e-6, rtol=LAST_BIT[logits.dtype])
    else:
        assert logits.equal(before)


@pytest.mark.parametrize("width", [50, 4096, 9001])
@pytest.mark.parametrize("dtype", LAST_BIT)
@pytest.mark.parametrize("keep", [False, True])
def test_chosen_softmax(width: int, dtype: torch.dtype, keep: bool) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(5, width, device=DEVICE) * 4).to(dtype)
    check_chosen(logits, torch.randint(0, width, (5,), device=DEVICE), keep)


@pytest.mark.parametrize("keep", [False, True])
def test_excluded_tokens_may_fill_whole_blocks(keep: bool) -> None:
    logits = torch.randn(4, 9001, device=DEVICE)
    for row, excluded in enumerate((slice(0, 4096), slice(0, 8192), slice(4096, None), slice(1, 8999))):
        logits[row, excluded] = -torch.inf
    check_chosen(logits, torch.tensor([5000, 9000, 17, 0], device=DEVICE), keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "temperature"), [(50, 1.0), (9001, 0.6)])
def test_draws_are_those_of_choose(width: int, temperature: float, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    count = 300 if DEVICE == "cuda" else 40
    logits = (torch.randn(count, width) * 3).to(dtype)
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
