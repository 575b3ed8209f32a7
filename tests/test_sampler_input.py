"""What the sampler refuses, each with its sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_sampler import KV_HEADS, LAYERS, VOCABULARY, WINDOW, make
from transformers import LlamaConfig, LlamaForCausalLM

from rlkv.errors import RLKVError
from rlkv.sampler import Sampler


@pytest.mark.parametrize(
    ("prompts", "gates", "words"),
    [
        ([[5], []], None, "prompt 1 is empty"),
        ([[5], [5] * 40], None, "prompt 1 has 40 tokens.*max_length=40"),
        ([[5]], torch.ones(LAYERS, KV_HEADS + 1), r"shape \[3, 4\]"),
        ([[5], [6]], torch.ones(3, LAYERS, KV_HEADS), r"\[2, 3, 4\]"),
        ([[5]], torch.full((LAYERS, KV_HEADS), torch.nan), "NaN"),
        (
            [[5]],
            torch.linspace(0, 1.75, LAYERS * KV_HEADS).view(LAYERS, KV_HEADS),
            r"\[0, 1\], got 0 to 1.75",
        ),
        ([[5]], torch.full((1, LAYERS, KV_HEADS), -0.5), r"\[0, 1\], got -0.5"),
    ],
)
def test_bad_input_is_named(prompts: list[list[int]], gates: torch.Tensor | None, words: str) -> None:
    with pytest.raises(RLKVError, match=words):
        Sampler(make(), WINDOW, slots=2, max_length=40).generate(prompts, gates=gates)


def test_bad_sampler_is_named() -> None:
    with pytest.raises(RLKVError, match="prefill"):
        Sampler(make(), WINDOW, max_length=40, prefill="some")  # type: ignore[arg-type]
    with pytest.raises(RLKVError, match="cuda_graphs"):
        Sampler(make(), WINDOW, max_length=40, cuda_graphs=True)
    with pytest.raises(RLKVError, match="slots"):
        Sampler(make(), WINDOW, slots=0, max_length=40)
    with pytest.raises(RLKVError, match="max_length=513 exceeds the model's context of 512"):
        Sampler(make(), WINDOW, max_length=513)
    broken = make()
    broken.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(RLKVError, match="NaN logits for prompt 0"):
        Sampler(broken, WINDOW, max_length=40).generate([[5]])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_follow_the_batch_are_refused(kind: str) -> None:
    options: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    options["original_max_position_embeddings"] = 128
    if kind == "longrope":
        options |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters=options,
    )
    model = LlamaForCausalLM(config).eval()
    with pytest.raises(RLKVError, match=f"llama has {kind} RoPE.*longest request"):
        Sampler(model, WINDOW, max_length=40)
