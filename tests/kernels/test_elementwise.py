"""The decode step's small kernels, and the mixed kernel behind ``Mixed``, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from kernel_kit import DEVICE
from transformers.masking_utils import causal_mask_function

pytest.importorskip("triton")
from rlkv.attention import Mixed  # noqa: E402
from rlkv.attention.layout import make_layout  # noqa: E402
from rlkv.errors import RLKVError  # noqa: E402
from rlkv.kernels.elementwise import add_norm, rotary, silu_times  # noqa: E402
from rlkv.window import Window  # noqa: E402


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_add_norm() -> None:
    x, residual, weight = (torch.randn(*shape, device=DEVICE) for shape in ((5, 96), (5, 96), (96,)))
    wide = (x + residual).double()
    norm = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight
    normed, total = add_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(normed.double(), norm, atol=1e-5, rtol=1e-5)
    assert total.equal(x + residual)
    alone, same = add_norm(total, None, weight, 1e-5)
    assert alone.equal(normed) and same is total


def test_silu_times_of_parts_of_one_product() -> None:
    product = torch.randn(5, 200, device=DEVICE)
    gate, up = product.split(100, -1)
    torch.testing.assert_close(silu_times(product), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("normed", [False, True])
def test_rotary_turns_pairs_by_their_angles(normed: bool) -> None:
    states = torch.randn(5, 11, 16, device=DEVICE)
    query, key = states[:, :6], states[:, 6:9]
    angle = torch.rand(5, 8, device=DEVICE)
    norms = tuple(torch.randn(16, device=DEVICE) for _ in range(2))
    turned = rotary(
        query,
        key,
        angle.cos().repeat(1, 2),
        angle.sin().repeat(1, 2),
        (norms[0], norms[1]) if normed else None,
        1e-6,
    )
    for part, found, weight in zip((query, key), turned, norms, strict=True):
        if normed:
            part = part * torch.rsqrt(part.square().mean(-1, keepdim=True) + 1e-6) * weight
        pairs = torch.complex(part[..., :8], part[..., 8:])
        pairs = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
        torch.testing.assert_close(found, torch.cat([pairs.real, pairs.imag], -1), atol=1e-5, rtol=1e-5)


class Module:
    layer_idx = 0

    class config:
        num_hidden_layers = 1


@pytest.mark.parametrize("each", [False, True])
def test_mixed_takes_the_kernel_and_gives_the_references_gradients(each: bool) -> None:
    dtype = torch.float16 if DEVICE == "cuda" else torch.float32
    shapes = ((2, 4, 40, 16), (2, 2, 40, 16), (2, 2, 40, 16))
    states = [torch.randn(shape, device=DEVICE, dtype=dtype) for shape in shapes]
    gates = torch.tensor([0.3, 0.0], device=DEVICE)
    gates = torch.stack([gates, gates.flip(0)])[:, None] if each else gates[None]
    layout = make_layout(
        batch_size=2,
        q_length=40,
        kv_length=40,
        mask_function=causal_mask_function,
        device=torch.device(DEVICE),
    )
    found = []
    for path in ("kernel", "reference"):
        inputs = [part.clone().requires_grad_() for part in (*states, gates)]
        mixed = Mixed(inputs[3], Window(3, 9), path)
        output = mixed.attend(Module, inputs[0], inputs[1], inputs[2], layout, 0.25)
        weights = torch.linspace(-1, 1, output.numel(), device=DEVICE).view(output.shape)
        found.append((output, *torch.autograd.grad((output * weights).sum(), inputs)))
    for ours, right in zip(*found, strict=True):
        torch.testing.assert_close(ours, right, atol=2e-2 if dtype == torch.float16 else 1e-4, rtol=1e-2)


def test_what_the_kernel_cannot_take_is_said() -> None:
    states = [torch.randn(1, heads, 8, 24, device=DEVICE) for heads in (2, 1, 1)]  # no tiles for 24
    layout = make_layout(
        batch_size=1,
        q_length=8,
        kv_length=8,
        mask_function=causal_mask_function,
        device=torch.device(DEVICE),
    )
    mixed = Mixed(torch.full((1, 1), 0.5, device=DEVICE), Window(3, 4), "kernel")
    with pytest.raises(RLKVError, match="mixed kernel needs"):
        mixed.attend(Module, states[0], states[1], states[2], layout, 0.25)
