"""A Llama-8B of random weights: its speed is that of the real one, and no download is needed."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlkv.attention import NAME


def random_llama(device: str = "cuda", tiny: bool = False) -> Any:
    """bf16, frozen, in eval mode; ``tiny`` is a few megabytes, for trying a benchmark out."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    if tiny:
        sizes = {
            "vocab_size": 20000,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 16,
        }
    config = LlamaConfig(max_position_embeddings=131072, rope_theta=500000.0, eos_token_id=None, **sizes)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.set_attn_implementation(NAME)
    return model.eval().requires_grad_(False)


def weight_bytes(model: Any) -> int:
    """Bytes that a decode step reads: everything but the input embedding."""
    embedding = model.get_input_embeddings().weight.nbytes
    return sum(parameter.nbytes for parameter in model.parameters()) - embedding


def random_gates(model: Any, closed: float = 0.0) -> torch.Tensor:
    """Gates between 0 and 1 for every KV head; a share ``closed`` of them, at random, is exactly 0."""
    shape = (model.config.num_hidden_layers, model.config.num_key_value_heads)
    generator = torch.Generator().manual_seed(2)
    gates = torch.rand(shape, generator=generator).clamp(0.01, 0.99)
    order = torch.rand(gates.numel(), generator=generator).argsort()
    gates.view(-1)[order[: round(closed * gates.numel())]] = 0
    return gates
