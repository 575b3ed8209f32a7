"""Attention over the same pages in plain PyTorch, for where the kernels can't run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlkv.window import Window


@dataclass(frozen=True)
class PlainPlan:
    """What a step reads: as :class:`rlkv.kernels.decode.DecodePlan`, without the division of work."""

    counts: torch.Tensor
    gates: torch.Tensor | None
    window: Window | None


class PlainDecoder:
    """The interface of :class:`rlkv.kernels.decode.PagedDecoder`; shapes and meaning are the same."""

    def plan(
        self, counts: torch.Tensor, gates: torch.Tensor | None = None, window: Window | None = None
    ) -> PlainPlan:
        return PlainPlan(counts, gates, window)

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        table: torch.Tensor,
        plan: PlainPlan,
        layer: int,
        scaling: float,
    ) -> torch.Tensor:
        counts = plan.counts[layer][..., None]  # [n, kv_heads, 1]
        page = keys.shape[1]
        pages = table[..., : max(-(-int(counts.max()) // page), 1)].long()
        at = torch.arange(pages.shape[-1] * page, device=query.device)
        seen = at < counts
        pages = pages.masked_fill(~seen[..., ::page], 0)
        key = keys[pages].flatten(2, 3).masked_fill(~seen[..., None], 0.0)  # [n, kv_heads, tokens, D]
        value = values[pages].flatten(2, 3).masked_fill(~seen[..., None], 0.0)
        count, heads, dim = query.shape
        folded = query.view(count, key.shape[1], -1, dim)
        scores = (folded @ key.mT * scaling).float().masked_fill(~seen[:, :, None], -1e30)
        weights = scores.softmax(-1)
        if plan.gates is not None and plan.window is not None:
            near = plan.window.sees(counts - 1, at)[:, :, None]
            gate = plan.gates[:, layer, :, None, None]
            weights = gate * weights + (1 - gate) * scores.masked_fill(~near, -1e30).softmax(-1)
        weights = weights.masked_fill(~seen[:, :, None], 0.0)
        return (weights.to(value.dtype) @ value).view(count, heads, dim)


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    full: torch.Tensor,
    window: Window,
) -> None:
    """As :func:`rlkv.kernels.decode.store`; a negative position goes to page 0, which is nobody's."""
    at = positions.clamp(min=0)[:, None]
    place = torch.where(full.view(-1, key.shape[1]), at, window.slot(at))
    page = table.gather(2, (place // keys.shape[1])[..., None].long())[..., 0].long()
    page = page.masked_fill(positions[:, None] < 0, 0)
    keys[page, place % keys.shape[1]] = key
    values[page, place % keys.shape[1]] = value
