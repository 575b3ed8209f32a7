"""Which models are accepted, with what shape, and the reason given for each refusal."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DiffLlamaConfig,
    Gemma2Config,
    GPT2Config,
    JambaConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3Config,
    Qwen3NextConfig,
    T5Config,
)

from rlkv import RLKVError
from rlkv.support import ModelShape, check_model

SIZES = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "vocab_size": 16,
    "max_position_embeddings": 128,
}
SPLITTABLE = {
    "llama": (LlamaConfig(**SIZES), 8),
    "qwen2": (Qwen2Config(**SIZES), 8),
    "qwen3": (Qwen3Config(**SIZES, head_dim=16), 16),
    "mistral": (MistralConfig(**SIZES, sliding_window=None), 8),
}


@pytest.mark.parametrize("kind", SPLITTABLE)
def test_shape_from_config_and_from_model(kind: str) -> None:
    config, head_dim = SPLITTABLE[kind]
    shape = check_model(config)
    assert shape == ModelShape(2, 4, 2, head_dim, model_type=kind, context_length=128)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    seen = check_model(model)
    assert seen.same_heads(shape) and seen.bytes_per_value == 4
    key = model.model.layers[0].self_attn.k_proj
    assert key.out_features == seen.kv_heads * seen.head_dim
    assert seen.bytes_per_token == 2 * head_dim * 4


REFUSED = [
    (MistralConfig(), "its layers use a sliding window of 4096 tokens"),
    (
        Qwen2Config(**SIZES, use_sliding_window=True, max_window_layers=1),
        r"1 of its 2 layers .*\(1 sliding_attention\)",
    ),
    (Qwen3Config(**SIZES, layer_types=["full_attention", "sliding_attention"]), "1 of its 2 layers"),
    (Gemma2Config(), "sliding_attention"),
    (DeepseekV3Config(), r"multi-head latent attention \(MLA\)"),
    (JambaConfig(), "(hybrid|mamba|linear_attention)"),
    (Qwen3NextConfig(), "linear_attention"),
    (T5Config(), "encoder-decoder"),
    (Qwen2VLConfig(), "multimodal"),
    (GPT2Config(), "names no KV heads"),
    (DiffLlamaConfig(), "differential attention"),
    (LlamaConfig(**{**SIZES, "num_key_value_heads": 3}), "4 query heads don't divide by 3 KV heads"),
]


@pytest.mark.parametrize(("config", "reason"), REFUSED, ids=[row[0].model_type for row in REFUSED])
def test_refusals_name_the_model_and_the_reason(config: PretrainedConfig, reason: str) -> None:
    with pytest.raises(RLKVError, match=f"^{config.model_type} can't be split by KV head: .*{reason}"):
        check_model(config)


def test_window_that_is_switched_off() -> None:
    assert check_model(Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=4096)).layers == 2
    every_layer_full = Qwen2Config(**SIZES, use_sliding_window=True, max_window_layers=2)
    assert check_model(every_layer_full).layers == 2


def test_unknown_attention() -> None:
    class Unknown(PretrainedConfig):
        model_type = "unknown"
        num_attention_heads = num_key_value_heads = 2
        num_hidden_layers, hidden_size = 1, 8

    with pytest.raises(RLKVError, match="unknown can't be split.*no causal language model of this type"):
        check_model(Unknown())

    class Own(transformers.PreTrainedModel):
        config_class = Unknown

    with pytest.raises(
        RLKVError, match="unknown attention: Own does not use transformers' attention interface"
    ):
        check_model(Own(Unknown()))


def test_not_a_model() -> None:
    with pytest.raises(RLKVError, match="expected a transformers model or config, got str"):
        check_model("llama")


def test_shape_record() -> None:
    shape = ModelShape(2, 4, 2, 8, model_type="llama", name="mine", context_length=9, bytes_per_value=4)
    assert ModelShape.from_dict({**shape.to_dict(), "reward": 1.0}) == shape
    with pytest.raises(RLKVError, match="head_dim"):
        ModelShape.from_dict({"layers": 1, "query_heads": 1, "kv_heads": 1})


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, rlkv; print(rlkv.__version__, 'torch' in sys.modules, 'transformers' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split()[1:] == ["False", "False"]


def test_exports() -> None:
    import rlkv

    for name in rlkv.__all__:
        assert getattr(rlkv, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = rlkv.nothing
