"""The trainer's forward on the kernels: log-probabilities and gates' gradients of the models' own forward."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_kit import DEVICE

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_models import VOCABULARY, tiny  # noqa: E402

from rlkv import logprobs  # noqa: E402
from rlkv.attention import NAME, Mixed  # noqa: E402
from rlkv.family import FamilyForward  # noqa: E402
from rlkv.loading import recompute_activations  # noqa: E402
from rlkv.logprobs import response_logprobs  # noqa: E402
from rlkv.window import Window  # noqa: E402

WINDOW = Window(3, 6)
ROWS = [([3, 4, 5], list(range(20, 45))), ([7], list(range(10, 21)))]
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2}


def found(model: Any, gates: torch.Tensor, path: str) -> tuple[torch.Tensor, torch.Tensor]:
    gates = gates.clone().requires_grad_()
    chosen = response_logprobs(model, ROWS, 0.7, Mixed(gates, WINDOW, path))
    weights = torch.linspace(-1, 1, len(chosen), device=chosen.device)
    return chosen.detach(), torch.autograd.grad((chosen * weights).sum(), gates)[0]


@pytest.mark.parametrize(
    ("kind", "join", "each"), [("llama", True, False), ("qwen2", True, True), ("qwen3", False, False)]
)
def test_same_as_the_models_own_forward(
    monkeypatch: pytest.MonkeyPatch, kind: str, join: bool, each: bool
) -> None:
    dtype = torch.float16 if DEVICE == "cuda" else torch.float32
    model = tiny(kind, **SIZES)
    model.set_attn_implementation(NAME)
    gates = torch.tensor([[0.3, 0.0], [1.0, 0.6]])
    gates = torch.stack([gates, gates.flip(0)]) if each else gates
    right = found(model, gates, "reference")
    model, gates = model.to(DEVICE, dtype), gates.to(DEVICE)
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 5e-2, "rtol": 5e-2}
    calls: list[int] = []
    own = FamilyForward.__call__
    monkeypatch.setattr(FamilyForward, "__call__", lambda *x: (calls.append(1), own(*x))[1])
    if join:
        FamilyForward(model, join=True)
    plain = found(model, gates, "auto")
    recompute_activations(model)
    again = found(model.train(), gates, "auto")
    assert len(calls) == 2  # neither went the models' own way
    for ours in (plain, again):
        for part, wanted in zip(ours, right, strict=True):
            torch.testing.assert_close(part.cpu(), wanted, **tolerance)


def test_recomputed_layers_keep_their_inputs_alone() -> None:
    model = tiny("llama", **SIZES).to(DEVICE, torch.float16 if DEVICE == "cuda" else torch.float32)
    gates = torch.full((2, 2), 0.5, device=DEVICE, requires_grad=True)
    ids = torch.randint(0, VOCABULARY, (2, 20), device=DEVICE)

    def kept() -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_leaf:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logprobs.final_hidden(model, ids, Mixed(gates, WINDOW)).sum().backward()
        return sum(sizes.values())

    everything = kept()
    recompute_activations(model)
    model.train()
    assert kept() < everything / 2
