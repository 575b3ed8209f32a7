"""Tiny random models of the four supported architectures, their weights large enough to matter."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

torch.set_num_threads(1)  # such small tensors only lose by more

KINDS = ("llama", "qwen2", "qwen3", "mistral")
VOCABULARY = 61


def tiny(kind: str, *, seed: int = 0, attention: str = "eager", **overrides: Any) -> PreTrainedModel:
    """A float32 model in eval mode: 3 layers, 6 query heads, 3 KV heads of 8, unless overridden."""
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.25,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if kind == "mistral":
        options["sliding_window"] = None
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **(options | overrides))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # biases start at 0 and norms at 1, which would hide mistakes
                parameter.add_(0.3 * torch.randn_like(parameter))
            assert parameter.isfinite().all(), name
    return model.requires_grad_(False)


def prompts(lengths: list[int], *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left-padded random tokens, attention mask and position ids, each [batch, max(lengths)]."""
    width = max(lengths)
    ids = torch.randint(1, VOCABULARY, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    return ids * mask, mask, (mask.cumsum(-1) - 1).clamp(min=0)
