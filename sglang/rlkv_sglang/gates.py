"""Soft gates of a running engine, changed between two of its steps while requests go on."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

from rlkv.errors import RLKVError

if TYPE_CHECKING:
    import torch

NAME = "rlkv.gates"  # among the weights of an update


def gates_payload(gates: torch.Tensor) -> bytes:
    """Gates [layers, kv_heads] as SGLang's weight updates want them, one for each rank; HTTP wants base64."""
    return pickle.dumps([(NAME, gates.detach().float().cpu().clone())])


async def update_gates(engine: Any, gates: torch.Tensor) -> None:
    """New gates [layers, kv_heads] for an ``sglang.Engine`` with RLKV_MODE=mixed, running requests included.

    SGLang's own update waits until no request runs, unless generation is paused: so this pauses, updates and
    goes on, which takes some milliseconds. Older tokens keep the keys and values that they got by the old
    gates. An engine that is paused already stays so. Raises RLKVError, and changes nothing, for gates of
    another shape or with NaN.
    """
    from sglang.srt.managers.io_struct import (
        ContinueGenerationReqInput,
        PauseGenerationReqInput,
        UpdateWeightsFromTensorReqInput,
    )

    manager = engine.tokenizer_manager
    payloads = [gates_payload(gates)] * engine.server_args.tp_size
    update = UpdateWeightsFromTensorReqInput(serialized_named_tensors=payloads)
    running = not manager.is_pause
    if running:
        await manager.pause_generation(PauseGenerationReqInput(mode="in_place"))
    try:
        done, message = await manager.update_weights_from_tensor(update)
    finally:
        if running:
            await manager.continue_generation(ContinueGenerationReqInput(torch_empty_cache=False))
    if not done:
        raise RLKVError(message)
