"""Models by name: ``pocket``, a local folder, or a hub id."""

from __future__ import annotations

from typing import Any

import torch

from rlkv.errors import RLKVError
from rlkv.support import ModelShape, check_model

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` is the first GPU, or the CPU without one; RLKVError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RLKVError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def load_model(name: str, dtype: str = "bfloat16", device: str = "auto") -> tuple[Any, Any]:
    """(model in eval mode with frozen weights and "rlkv" attention, tokenizer).

    Raises RLKVError when it cannot be read, or its KV heads cannot be split.
    """
    from rlkv.attention import NAME

    if dtype not in DTYPES:
        raise RLKVError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    where = pick_device(device)
    if name == "pocket":
        from rlkv import pocket

        model, tokenizer = pocket.load(dtype=DTYPES[dtype])
        model.config.name_or_path = name  # what cards and masks record: no path of this machine
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[dtype])
        except (OSError, ValueError) as error:
            raise unreadable(name, error) from None
    check_model(model)
    model = model.to(where).eval().requires_grad_(False)
    model.set_attn_implementation(NAME)
    return model, tokenizer


def load_shape(name: str) -> ModelShape:
    """The shape of a model by name, from its config alone; RLKVError when that cannot be read or split."""
    from transformers import AutoConfig

    from rlkv.pocket import weights_folder

    try:
        config = AutoConfig.from_pretrained(weights_folder() if name == "pocket" else name)
    except (OSError, ValueError) as error:
        raise unreadable(name, error) from None
    config.name_or_path = name
    return check_model(config)


def unreadable(name: str, error: Exception) -> RLKVError:
    """What to say of a model that is neither in a folder nor on the hub."""
    reason = str(error).strip().splitlines()[0]
    return RLKVError(f"model {name!r} could not be loaded (a hub id or a local folder): {reason}")


def recompute_activations(model: Any) -> None:
    """Gradient checkpointing in its non-reentrant form, the one that carries gradients to the gates."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name in newer transformers
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
