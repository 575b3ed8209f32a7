"""What the training tests share: a tiny random model, a made-up tokenizer, a reward that gates move."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from rlkv.data import Problem
from rlkv.trainer import TrainConfig
from rlkv.window import Window

EOS = 1


class TinyTokenizer:
    """Characters to 31 ids; decoding writes the ids as numbers."""

    chat_template = "made up"

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        assert options == {"tokenize": False, "add_generation_prompt": True}
        assert [message["role"] for message in messages] == ["user"]
        return f"<u>{messages[0]['content']}<a>"

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) % 29 + 3 for letter in text]}

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, tokens))


def tiny_model(kind: str = "qwen3", layers: int = 2, seed: int = 0) -> Any:
    """Random weights large enough that attention matters; float32, 4 query heads on 2 KV heads a layer."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = dict(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=EOS,
        bos_token_id=None,
        pad_token_id=0,
    )
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape)).eval()
    return Qwen3ForCausalLM(Qwen3Config(**shape)).eval()


def share_even(text: str, problem: Problem) -> float:
    """The share of even token ids."""
    numbers = [int(word) for word in re.findall(r"\d+", text)]
    return sum(number % 2 == 0 for number in numbers) / max(1, len(numbers))


share_even.grades_truncated = True  # type: ignore[attr-defined]


def write_prompts(path: Path, count: int = 32) -> Path:
    rows = [{"prompt": f"question {index} of {index * index}", "answer": "1"} for index in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_config(folder: Path, **changes: Any) -> TrainConfig:
    """A run of a second or two; its prompts are written into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = write_prompts(folder / "prompts.jsonl")
    settings: dict[str, Any] = dict(
        model="tiny",
        data=str(prompts),
        output=str(folder / "run"),
        reward="training_kit:share_even",
        window=Window(1, 3),
        max_prompt_tokens=40,
        max_new_tokens=16,
        prompts_per_step=8,
        steps=4,
        slots=16,
        max_tokens_per_microbatch=500,
        tau=0.2,
        dtype="float32",
        device="cpu",
        validate_every=0,
        tensorboard=False,
    )
    return TrainConfig(**{**settings, **changes})


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
