"""Weights that change while the server is up: two more hooks, as those of hooks.py."""

from __future__ import annotations

from typing import Any

from rlkv.errors import RLKVError
from rlkv_sglang.gates import NAME
from rlkv_sglang.hooks import Original, serving_of


def update_from_tensors(
    original: Original, updater: Any, named_tensors: Any, load_format: str | None = None
) -> Any:
    """Say no, and change nothing, where SGLang would take unpermuted weights, or die of an error."""
    serving = serving_of(updater)
    if serving is None:
        return original(updater, named_tensors, load_format)
    if load_format not in (None, "flattened_bucket"):
        if not serving.mixed:
            return False, f"rlkv: load_format {load_format} would leave heads in the checkpoint's order"
        if any(name == NAME for name, _ in named_tensors):
            return False, f"rlkv: {NAME} can't be updated with load_format {load_format}"
    try:
        return original(updater, named_tensors, load_format)
    except RLKVError as error:
        return False, f"rlkv: {error}"


def flush_after_update(original: Original, manager: Any, request: Any) -> None:
    """With soft gates there is nothing to flush, no prefix being cached; SGLang would want an idle server."""
    serving = serving_of(manager.tp_worker.model_runner)
    if serving is None or not serving.mixed:
        original(manager, request)
