"""Attention and cache on a GPU against the CPU, float32; bfloat16 runs and stays near."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_models import prompts, tiny

from rlkv.attention import Mixed, enable
from rlkv.cache import HeadwiseCache
from rlkv.mask import HeadMask
from rlkv.window import Window

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
WINDOW = Window(3, 9)
SOME = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 0]]).bool()
LENGTHS = [83, 51, 30, 5]


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("path", ["reference", "chunked"])
def test_logits_and_gate_gradients(path, padded):
    ids, mask, positions = prompts(LENGTHS)
    options = {"attention_mask": mask, "position_ids": positions} if padded else {}
    results = []
    for device in ("cpu", "cuda"):
        model = tiny("qwen3").to(device)
        enable(model)
        gates = torch.linspace(0, 1, 9, device=device).view(3, 3).requires_grad_()
        moved = {name: tensor.to(device) for name, tensor in options.items()}
        logits = model(ids.to(device), use_cache=False, rlkv=Mixed(gates, WINDOW, path), **moved).logits
        (logits.log_softmax(-1)[..., 3] * mask.to(device)).mean().backward()
        results.append((logits[mask.bool().to(device)].detach().cpu(), gates.grad.cpu()))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize("block", [16, 128], ids=["blocks", "dense"])
@pytest.mark.parametrize("policy", ["full", "local"])
def test_generate(policy, block):
    ids, mask, _ = prompts(LENGTHS)
    logits = {}
    for name, device, dtype in (
        ("cpu", "cpu", torch.float32),
        ("cuda", "cuda", torch.float32),
        ("half", "cuda", torch.bfloat16),
    ):
        model = tiny("llama").to(device, dtype)
        enable(model)
        cache = HeadwiseCache(model.config, HeadMask(SOME, WINDOW), prefill=policy, block=block)
        result = model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            past_key_values=cache,
            max_new_tokens=40,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits[name] = torch.stack(result.logits, 1).float().cpu()
    torch.testing.assert_close(logits["cuda"], logits["cpu"], atol=3e-4, rtol=0)
    assert (logits["half"][:, 0] - logits["cpu"][:, 0]).abs().mean() < 0.1  # before greedy choices part
