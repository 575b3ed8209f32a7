"""Soft-max over a vocabulary, a row a program: log-probabilities of given tokens, and drawing new ones.

Logits are read once or twice in the 16 bits that they come in; PyTorch's float32 copies, log-softmax, exp and
running sums move ten times the bytes, in a dozen launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlkv.kernels import check_device

BLOCK = 4096


@triton.jit
def _chosen_kernel(logits, tokens, chosen, inverse, width, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    """Log-probability of a row's token; with KEEP one-hot(token) - softmax takes the logits' place."""
    row = tl.program_id(0).to(tl.int64)
    here = logits + row * width
    at = tl.arange(0, BLOCK)
    high = float("-inf")
    mass = 0.0
    for start in range(0, width, BLOCK):
        x = tl.load(here + start + at, mask=start + at < width, other=float("-inf")).to(tl.float32) * inverse
        above = tl.maximum(high, tl.max(x, 0))
        shift = tl.where(above == float("-inf"), 0.0, above)  # nothing but excluded tokens so far
        mass = mass * tl.exp(high - shift) + tl.sum(tl.exp(x - shift), 0)
        high = above
    log_mass = high + tl.log(mass)
    token = tl.load(tokens + row)
    tl.store(chosen + row, tl.load(here + token).to(tl.float32) * inverse - log_mass)
    if KEEP:
        tl.debug_barrier()  # the token's logit is read before its place is taken
        for start in range(0, width, BLOCK):
            inside = start + at < width
            x = tl.load(here + start + at, mask=inside, other=0.0).to(tl.float32) * inverse
            slope = tl.where(start + at == token, 1.0, 0.0) - tl.exp(x - log_mass)
            tl.store(here + start + at, slope.to(logits.dtype.element_ty), mask=inside)


def chosen_softmax_(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: float, keep: bool
) -> torch.Tensor:
    """float32 [n]: log softmax(logits / temperature)[token]; ``logits`` [n, V] contiguous, tokens int64 [n].

    With ``keep`` the logits become one-hot(token) - softmax, else they stay.
    """
    check_device(logits, tokens)
    chosen = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        _chosen_kernel[(len(logits),)](
            logits, tokens, chosen, 1 / temperature, logits.shape[1], KEEP=keep, BLOCK=BLOCK, num_warps=8
        )
    return chosen


@triton.jit
def _shifted(bits, by: tl.constexpr):
    return (bits >> by) & ((1 << (64 - by)) - 1)


@triton.jit
def _uniform(key, count, STEP: tl.constexpr, MIX_1: tl.constexpr, MIX_2: tl.constexpr):
    """As :func:`rlkv.sampling.uniform`."""
    bits = (key + count) * STEP + STEP
    bits = (bits ^ _shifted(bits, 30)) * MIX_1
    bits = (bits ^ _shifted(bits, 27)) * MIX_2
    bits = bits ^ _shifted(bits, 31)
    return _shifted(bits, 16).to(tl.float64) * (2.0**-48)


@triton.jit
def _draw_kernel(
    logits, keys, counts, tokens, logprobs, highs, masses, inverse, width,
    STEP: tl.constexpr, MIX_1: tl.constexpr, MIX_2: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The distribution function of a row's tokens, inverted: first over blocks of them, then within one."""
    row = tl.program_id(0).to(tl.int64)
    here = logits + row * width
    at = tl.arange(0, BLOCK)
    blocks = (width + BLOCK - 1) // BLOCK
    for block in range(0, blocks):
        token = block * BLOCK + at
        x = tl.load(here + token, mask=token < width, other=float("-inf")).to(tl.float32) * inverse
        high = tl.max(x, 0)
        shift = tl.where(high == float("-inf"), 0.0, high)
        tl.store(highs + row * BLOCKS + block, high)
        tl.store(masses + row * BLOCKS + block, tl.sum(tl.exp(x - shift), 0))
    tl.debug_barrier()
    index = tl.arange(0, BLOCKS)
    high_of = tl.load(highs + row * BLOCKS + index, mask=index < blocks, other=float("-inf"))
    mass_of = tl.load(masses + row * BLOCKS + index, mask=index < blocks, other=0.0)
    high = tl.max(high_of, 0)
    share = mass_of.to(tl.float64) * tl.exp(high_of - high).to(tl.float64)
    total = tl.sum(share, 0)
    target = total * _uniform(tl.load(keys + row), tl.load(counts + row), STEP, MIX_1, MIX_2)
    chosen = tl.sum((tl.cumsum(share, 0) <= target).to(tl.int32), 0)
    chosen = tl.minimum(chosen, blocks - 1)
    left = target - tl.sum(tl.where(index < chosen, share, 0.0), 0)
    token = chosen * BLOCK + at
    x = tl.load(here + token, mask=token < width, other=float("-inf")).to(tl.float32) * inverse
    mass = tl.exp(x - high).to(tl.float64)
    # rounding must not carry the draw past the block's last token of any mass
    left = tl.minimum(left, tl.sum(mass, 0) * (1.0 - 2.0**-40))
    place = tl.sum((tl.cumsum(mass, 0) <= left).to(tl.int32), 0)
    place = chosen * BLOCK + tl.minimum(place, BLOCK - 1)
    place = tl.minimum(place, width - 1)
    found = tl.load(here + place).to(tl.float32) * inverse
    tl.store(tokens + row, place.to(tl.int64))
    tl.store(logprobs + row, (found - high) - tl.log(total.to(tl.float32)))


def draw(
    logits: torch.Tensor, keys: torch.Tensor, counts: torch.Tensor, temperature: float, mix: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens int64 [n] from softmax(logits / temperature), and their log-probabilities float32 [n].

    ``logits`` [n, V] contiguous; ``keys``, ``counts`` int64 [n] and the three numbers ``mix`` are those of
    :func:`rlkv.sampling.uniform`.
    """
    check_device(logits, keys, counts)
    rows, width = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    blocks = 1 << (-(-width // BLOCK) - 1).bit_length()
    highs, masses = torch.empty(2, rows, blocks, dtype=torch.float32, device=logits.device)
    step, first, second = mix
    _draw_kernel[(rows,)](
        logits, keys.contiguous(), counts.contiguous(), tokens, logprobs, highs, masses, 1 / temperature,
        width, STEP=step, MIX_1=first, MIX_2=second, BLOCKS=blocks, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return tokens, logprobs
