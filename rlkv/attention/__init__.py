"""Mixed attention as a transformers attention implementation named ``rlkv``.

    enable(model)                                       # or model.set_attn_implementation("rlkv")
    model(ids, rlkv=Mixed(gates, window), use_cache=False)      # training: gates of shape [layers, kv_heads]
    model.generate(..., past_key_values=HeadwiseCache(model.config, mask, window))

Importing this package registers the attention function and its mask function. Without ``rlkv=`` and with an
ordinary cache it is the base model's full attention.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from rlkv.attention.layout import Layout, make_layout
from rlkv.attention.mixed import Mixed, full_attention
from rlkv.errors import RLKVError
from rlkv.support import ModelShape, check_model

__all__ = ["NAME", "Handle", "Layout", "Mixed", "enable", "rlkv_attention"]

NAME = "rlkv"


class Handle(Protocol):
    """What our caches return from ``update``: it stores the new keys and attends, in one place.

    transformers passes it through to the attention function as both ``key`` and ``value``.
    """

    def attend(self, query: torch.Tensor, layout: Layout, scaling: float) -> torch.Tensor:
        """query [B, Hq, Tq, D] -> [B, Hq, Tq, D]."""
        ...


def enable(model: PreTrainedModel) -> ModelShape:
    """Switch a model to this attention; its weights and their requires_grad stay as they are.

    Raises RLKVError, naming the model and the reason, for one that can't be split by KV head.
    """
    shape = check_model(model)
    model.set_attn_implementation(NAME)
    return shape


def rlkv_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | Handle,
    value: torch.Tensor | Handle,
    attention_mask: Layout | None,
    scaling: float,
    dropout: float = 0.0,
    rlkv: Mixed | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function: query [B, Hq, Tq, D]; returns ([B, Tq, Hq, D], None)."""
    if not isinstance(attention_mask, Layout):
        raise RLKVError("rlkv attention takes a 2D attention_mask [batch, tokens] or none, not a 4D mask")
    if dropout:
        raise RLKVError(f"rlkv attention has no dropout; set config.attention_dropout = 0 (it is {dropout})")
    if not isinstance(key, torch.Tensor):
        if rlkv is not None:
            raise RLKVError("soft gates (rlkv=Mixed(...)) and a HeadwiseCache exclude each other")
        output = key.attend(query, attention_mask, scaling)
    else:
        assert isinstance(value, torch.Tensor)
        if rlkv is None:
            output = full_attention(query, key, value, attention_mask, scaling)
        else:
            output = rlkv.attend(module, query, key, value, attention_mask, scaling)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, rlkv_attention)
AttentionMaskInterface.register(NAME, make_layout)
