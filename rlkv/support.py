"""Which models can be split into full and local KV heads, and the shape of those that can.

The method needs ordinary softmax attention over separate KV heads in every layer, called through the
attention interface of transformers. Whatever lacks that is refused here, by name, before anything runs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from rlkv.errors import RLKVError

# Settings that only configs of hybrid models without ``layer_types`` have.
HYBRID_KEYS = ("layers_block_type", "attn_layer_period", "mamba_d_state", "ssm_state_size", "full_attn_idxs")


@dataclass(frozen=True)
class ModelShape:
    """What gates, masks, caches and byte counts need to know of a model (head_dim in values, not bytes)."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    model_type: str = ""
    name: str = ""
    context_length: int = 0  # tokens; 0 when the config does not say
    bytes_per_value: int = 2  # of the KV cache: 2 for bfloat16, 4 for float32

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one KV head holds for one token: a key and a value."""
        return 2 * self.head_dim * self.bytes_per_value

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> ModelShape:
        """Read the fields of :meth:`to_dict`; other keys are ignored.

        RLKVError for a field that is missing or of another type.
        """
        known = {field.name: field.type for field in fields(cls)}
        values = {key: value for key, value in record.items() if key in known}
        for key, value in values.items():
            if type(value).__name__ != known[key]:
                raise RLKVError(f"model shape: {key} should be of type {known[key]}, but is {value!r}")
        try:
            return cls(**values)
        except TypeError as error:
            raise RLKVError(
                f"model shape: {error}; it needs layers, query_heads, kv_heads, head_dim"
            ) from None

    def describe(self) -> str:
        """One phrase for messages."""
        name = f" ({self.name})" if self.name else ""
        return (
            f"{self.model_type or 'model'}{name} with {self.layers} layers x {self.kv_heads} KV heads, "
            f"{self.query_heads} query heads, head_dim {self.head_dim}"
        )

    def same_heads(self, other: ModelShape) -> bool:
        """Whether gates of one fit the other; names, context and dtype may differ."""
        keys = ("layers", "query_heads", "kv_heads", "head_dim")
        same_type = not (self.model_type and other.model_type) or self.model_type == other.model_type
        return same_type and all(getattr(self, key) == getattr(other, key) for key in keys)


def check_fit(what: str, shape: torch.Size, recorded: ModelShape | None, model: Any) -> ModelShape:
    """The model's shape, if ``what`` of ``shape`` [layers, kv_heads] made for ``recorded`` belongs to it.

    ``model`` is a model, a config or a ModelShape. Raises RLKVError naming both sides.
    """
    actual = model if isinstance(model, ModelShape) else check_model(model)
    if recorded is not None and not recorded.same_heads(actual):
        raise RLKVError(
            f"{what} made for another model: {recorded.describe()}; this model is {actual.describe()}"
        )
    if tuple(shape) != (actual.layers, actual.kv_heads):
        raise RLKVError(
            f"{what} of the wrong shape: {shape[0]} layers x {shape[1]} KV heads, but this model is "
            f"{actual.describe()}"
        )
    return actual


def check_model(model_or_config: Any) -> ModelShape:
    """The shape of a transformers model or config; raises RLKVError with the reason if it can't be split."""
    config = getattr(model_or_config, "config", model_or_config)
    if not hasattr(config, "model_type"):
        raise RLKVError(f"expected a transformers model or config, got {type(model_or_config).__name__}")
    name = getattr(config, "name_or_path", "") or getattr(config, "_name_or_path", "")
    reason = _why_not(config) or _why_no_interface(model_or_config, config)
    if reason:
        raise RLKVError(
            f"{config.model_type}{f' ({name})' if name else ''} can't be split by KV head: {reason}"
        )
    query_heads = config.num_attention_heads
    dtype = getattr(model_or_config, "dtype", None) or getattr(config, "dtype", None)
    return ModelShape(
        layers=config.num_hidden_layers,
        query_heads=query_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // query_heads,
        model_type=config.model_type,
        name=name,
        context_length=getattr(config, "max_position_embeddings", None) or 0,
        bytes_per_value=dtype.itemsize if isinstance(dtype, torch.dtype) else 2,
    )


def _why_not(config: Any) -> str | None:
    """The first trait of a config that rules splitting out."""
    get = lambda key: getattr(config, key, None)  # noqa: E731
    if get("is_encoder_decoder"):
        return "it is an encoder-decoder; only decoder-only models are supported"
    if config.get_text_config() is not config:
        return "it is multimodal; load its language model alone"
    if get("kv_lora_rank"):
        return "multi-head latent attention (MLA) keeps one compressed state, no KV heads"
    other = Counter(kind for kind in get("layer_types") or () if kind != "full_attention")
    if other:
        kinds = ", ".join(f"{count} {kind}" for kind, count in other.items())
        return (
            f"{sum(other.values())} of its {config.num_hidden_layers} layers are not full attention ({kinds})"
        )
    if get("layer_types") is None and get("sliding_window") and get("use_sliding_window") is not False:
        return (
            f"its layers use a sliding window of {config.sliding_window} tokens "
            "(if the checkpoint was trained without one, set config.sliding_window = None)"
        )
    for key in HYBRID_KEYS:
        if get(key):
            return f"it is a hybrid of attention and recurrent layers ({key} is set)"
    if get("attn_logit_softcapping"):
        return "its attention caps the logits (attn_logit_softcapping)"
    if get("num_kv_shared_layers"):
        return "several of its layers share one KV cache (num_kv_shared_layers)"
    if config.model_type == "diffllama":
        return "differential attention subtracts two softmaxes"
    if not get("num_attention_heads") or not get("num_key_value_heads"):
        return "its config names no KV heads (num_key_value_heads)"
    if config.num_attention_heads % config.num_key_value_heads:
        return (
            f"{config.num_attention_heads} query heads don't divide by {config.num_key_value_heads} KV heads"
        )
    return None


def _why_no_interface(model_or_config: Any, config: Any) -> str | None:
    """Why transformers' attention interface can't reach this model's layers, if so."""
    cls: Any = type(model_or_config)
    if not isinstance(model_or_config, torch.nn.Module):
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            return "transformers knows no causal language model of this type"
        cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not getattr(cls, "_supports_attention_backend", False):
        return f"unknown attention: {cls.__name__} does not use transformers' attention interface"
    return None
