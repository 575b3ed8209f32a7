"""Head scores that took long to compute, kept in a folder named after everything they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlkv.config import plain
from rlkv.gates import HeadGates
from rlkv_eval.methods.base import Context, Method


def cached_scores(
    context: Context, method: Method, compute: Callable[[Path], HeadGates], **inputs: Any
) -> HeadGates:
    """What ``compute(folder)`` saved in ``context.work/<method>-<fingerprint>``, computed if it is not there.

    The fingerprint covers the method's settings, the model (shape, weights), the window and ``inputs``. A run
    killed in ``compute`` leaves no gates.tsv, so the next one computes again (or goes on, if it can).
    """
    facts = {
        "method": method.name,
        "settings": plain(method),
        "model": context.shape.to_dict(),
        "weights": weights_digest(context.model),
        "window": str(context.window),
        **inputs,
    }
    text = json.dumps(facts, sort_keys=True)
    folder = context.work / f"{method.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    if not (folder / "gates.tsv").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        compute(folder).save(folder, fingerprint=facts)
    return HeadGates.load(folder, model=context.model)


def weights_digest(model: Any) -> str:
    """Twelve hex digits from the first 64 values of every parameter: two trainings of one shape differ."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        first = parameter.detach().flatten()[:64].float().cpu().contiguous()
        digest.update(first.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def content_digest(texts: list[str]) -> str:
    """Twelve hex digits of a list of texts."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]
