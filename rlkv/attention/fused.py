"""The way from transformers' layout to the training kernel, for the forwards that it can take."""

from __future__ import annotations

import torch

from rlkv.attention.layout import Sequences
from rlkv.kernels import HEAD_DIMS, available, interpreted
from rlkv.window import Window

States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def takes(dtype: torch.dtype, device: torch.device, dim: int) -> bool:
    """Whether the kernel runs on states of this kind, heads of ``dim`` numbers."""
    if not available() or dim not in HEAD_DIMS:
        return False
    return dtype in (torch.bfloat16, torch.float16) if device.type == "cuda" else interpreted()


def lengths_of(query: torch.Tensor, key: torch.Tensor, sequences: Sequences | None) -> list[int] | None:
    """Lengths of the sequences, one after the other, if the kernel can take this forward; else None.

    query [B, Hq, T, D], key [B, Hkv, T, D]; ``sequences`` None means that every row is one.
    """
    batch, _, length, dim = query.shape
    if not takes(query.dtype, query.device, dim):
        return None
    if sequences is None:
        return [length] * batch
    at = 0
    for row, start, stop in sequences:
        if row * length + start != at:
            return None
        at = row * length + stop
    return [stop - start for _, start, stop in sequences] if at == batch * length else None


def attend(
    states: States,
    gates: torch.Tensor,
    lengths: list[int],
    window: Window,
    scaling: float,
    closed: tuple[int, ...],
) -> torch.Tensor:
    """query [B, Hq, T, D], key, value [B, Hkv, T, D] -> [B, Hq, T, D]; ``gates`` [Hkv] or [B, Hkv].

    ``closed``: KV heads whose gates are exactly 0.
    """
    from rlkv.kernels.mixed import mixed_attention

    batch, _, length, _ = states[0].shape
    flat = [part.transpose(1, 2).flatten(0, 1) for part in states]
    if gates.ndim == 2:  # one set a row, which may hold several sequences
        ends = torch.tensor(lengths).cumsum(0)
        rows = ((ends - 1) // length).to(gates.device)
        gates = gates[rows]
    output = mixed_attention(flat[0], flat[1], flat[2], gates, lengths, window, scaling, closed=closed)
    return output.unflatten(0, (batch, length)).transpose(1, 2)
