"""What goes into the sampler, checked, and what comes out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rlkv.errors import RLKVError
from rlkv.support import ModelShape, check_model


@dataclass
class Completion:
    """One finished request: ``tokens`` without the prompt, with the stop token.

    ``logprobs``: of each token at the sampling temperature, before top-k and top-p (greedy: temperature 1).
    """

    index: int
    tokens: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length"]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """``model`` in eval mode: in train() mode gradient checkpointing would drop the cache."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def check_settings(model: Any, slots: int, max_length: int, prefill: str) -> ModelShape:
    """The model's shape; raises RLKVError if it can't be sampled from, or so."""
    shape = check_model(model)
    if slots < 1 or max_length < 2:
        raise RLKVError(f"sampler: needs slots >= 1 and max_length >= 2, got {slots} and {max_length}")
    if prefill not in ("local", "full"):
        raise RLKVError(f'sampler: prefill must be "local" or "full", got {prefill!r}')
    check_positions(model, shape.context_length, max_length)
    return shape


def check_positions(model: Any, context: int, max_length: int) -> None:
    """Raise RLKVError for requests beyond the context, or positions that depend on the rest of a batch."""
    if context and max_length > context:
        raise RLKVError(f"sampler: max_length={max_length} exceeds the model's context of {context} tokens")
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        raise RLKVError(
            f"sampler: {model.config.model_type} has {rope['rope_type']} RoPE, whose frequencies follow the "
            "longest request of a batch: answers would depend on their neighbours and differ from training"
        )


def checked_prompts(prompts: Sequence[Sequence[int]], max_length: int) -> list[list[int]]:
    """The prompts as lists; raises RLKVError for an empty one and for one that leaves no room for a token."""
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise RLKVError(f"sampler: prompt {index} is empty; give it at least one token")
        if len(prompt) >= max_length:
            raise RLKVError(
                f"sampler: prompt {index} has {len(prompt)} tokens, but prompt and completion together may "
                f"have max_length={max_length}; shorten the prompt or raise max_length"
            )
    return [[int(token) for token in prompt] for prompt in prompts]


def checked_gates(
    gates: torch.Tensor | None, prompts: int, layers: int, kv_heads: int, device: torch.device
) -> torch.Tensor | None:
    """Gates as float32 [1 or prompts, layers, kv_heads] on the device; None when every head is full."""
    if gates is None:
        return None
    shape, shapes = list(gates.shape), [[layers, kv_heads], [prompts, layers, kv_heads]]
    if shape not in shapes:
        raise RLKVError(
            f"sampler: gates must have shape {shapes[0]} (layers, KV heads) or {shapes[1]} (one set a "
            f"prompt), got {shape}"
        )
    if not torch.isfinite(gates).all():
        raise RLKVError("sampler: the gates hold NaN or infinity; load or initialise them again")
    if ((gates < 0) | (gates > 1)).any():
        low, high = gates.min().item(), gates.max().item()
        raise RLKVError(f"sampler: gates must lie in [0, 1], got {low:g} to {high:g}; clamp them")
    if (gates == 1).all():
        return None
    return gates.detach().to(device, torch.float32).reshape(-1, layers, kv_heads)


def end_ids(model: Any) -> tuple[int, ...]:
    """End-of-sequence ids of the model's generation config, else of its config; empty if it names none."""
    for config in (getattr(model, "generation_config", None), model.config):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return (eos,) if isinstance(eos, int) else tuple(eos)
    return ()
