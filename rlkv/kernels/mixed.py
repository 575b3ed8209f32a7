"""Mixed attention for training: gate * full + (1 - gate) * local over packed sequences, with all gradients.

Local keys are computed once, for both branches: a library kernel does the far keys
(:mod:`rlkv.kernels.rest`), a Triton kernel does the window's and merges. The window is token-exact
(:class:`rlkv.window.Window`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from rlkv.errors import RLKVError
from rlkv.kernels import check_device, check_head_dim
from rlkv.kernels.mixed_kernels import FIELDS, forward_kernel, key_gradient_kernel, query_gradient_kernel
from rlkv.kernels.rest import FarPass, FarResult, States
from rlkv.window import Window


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut: rows (positions * query heads a KV head), keys, and Triton's own numbers."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tuning:
    """The three kernels' tiles, and how many queries a sink tile of the last one takes."""

    forward: Tile = Tile(64, 64, 4, 3)
    queries: Tile = Tile(64, 32, 4, 3)
    keys: Tile = Tile(32, 64, 4, 3)
    stretch: int = 256


DEFAULT = Tuning()


@dataclass(frozen=True)
class Plan:
    """What the kernels know of one packing; made once, used by every layer."""

    window: Window
    far: FarPass
    forward_tiles: torch.Tensor  # int32 [tiles, FIELDS], see mixed_kernels.py
    query_tiles: torch.Tensor
    key_tiles: torch.Tensor
    query_docs: torch.Tensor  # int64 [query tiles]
    sink_rows: torch.Tensor  # int64: packed rows of all sinks' keys
    sink_cells: torch.Tensor  # int64: where the float32 buffer has them
    docs: int


@lru_cache(maxsize=64)  # a batch has some forty shapes
def make_plan(
    lengths: tuple[int, ...], window: Window, groups: int, device: torch.device, tuning: Tuning = DEFAULT
) -> Plan:
    """The tiles of a packed row; ``groups`` query heads share a KV head."""
    if not lengths or min(lengths) < 1:
        raise RLKVError(f"mixed attention: every sequence needs a token; got lengths {list(lengths)}")
    window = Window(min(window.sink, max(lengths)), min(window.recent, max(lengths)))
    far = FarPass(lengths, window, device)
    starts = [0, *accumulate(lengths)]

    def tile_table(rows: list[tuple[int, ...]]) -> torch.Tensor:
        """Rows are (doc, tile start, first query, past the last query, sink or not)."""
        table = [
            (doc, starts[doc], starts[doc + 1], start, first, stop, sink, *far.bases[doc])
            for doc, start, first, stop, sink in rows
        ]
        return torch.tensor(table, dtype=torch.int32).view(-1, FIELDS).to(device)

    def query_rows(tile: Tile) -> list[tuple[int, ...]]:
        step = max(tile.rows // _padded(groups), 1)
        return [(doc, at, 0, 0, 0) for doc, length in enumerate(lengths) for at in range(0, length, step)]

    key_rows: list[tuple[int, ...]] = []
    step = tuning.keys.keys
    for doc, length in enumerate(lengths):
        for start in range(0, min(window.sink, length), step):
            for first in range(start, length, tuning.stretch):
                key_rows.append((doc, start, first, min(first + tuning.stretch, length), 1))
        for start in range(window.sink, length, step):
            key_rows.append((doc, start, start, min(start + step - 1 + window.recent, length), 0))
    key_rows.sort(key=lambda row: row[2] - row[3])  # longest first
    sinks = [(doc, at) for doc, length in enumerate(lengths) for at in range(min(window.sink, length))]
    return Plan(
        window=window,
        far=far,
        forward_tiles=tile_table(query_rows(tuning.forward)),
        query_tiles=tile_table(query_rows(tuning.queries)),
        key_tiles=tile_table(key_rows),
        query_docs=torch.tensor([row[0] for row in query_rows(tuning.queries)]).to(device),
        sink_rows=torch.tensor([starts[doc] + at for doc, at in sinks], dtype=torch.int64).to(device),
        sink_cells=torch.tensor([doc * window.sink + at for doc, at in sinks], dtype=torch.int64).to(device),
        docs=len(lengths),
    )


def _padded(groups: int) -> int:
    return 1 << (groups - 1).bit_length()


def mixed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gates: torch.Tensor,
    lengths: Sequence[int],
    window: Window,
    scaling: float,
    *,
    closed: Sequence[int] = (),
    tuning: Tuning = DEFAULT,
) -> torch.Tensor:
    """query [T, Hq, D], key and value [T, Hkv, D] of ``lengths``, one after the other -> like query.

    ``gates`` float32 [Hkv] or [sequences, Hkv]. ``closed``: KV heads whose gates the caller knows to be
    exactly 0: their far keys are left out of the backward pass, and of the forward pass too unless a gate
    needs its gradient. Heads whose gate is exactly 1 have nothing to leave out: their local keys belong to
    full attention. Raises RLKVError for a head dim without tiles, lengths that don't add up, or a CPU.
    """
    heads, dim = key.shape[1:]
    check_device(query, key, value)
    check_head_dim(dim)
    groups = query.shape[1] // heads
    if (
        sum(lengths) != len(query)
        or gates.shape[-1] != heads
        or gates.shape[:-1] not in ((), (len(lengths),))
    ):
        raise RLKVError(
            f"mixed attention: {len(query)} tokens with {heads} KV heads don't fit lengths that add up to "
            f"{sum(lengths)} and gates {list(gates.shape)}"
        )
    plan = make_plan(tuple(lengths), window, groups, query.device, tuning)
    return _MixedAttention.apply(query, key, value, gates.float(), plan, scaling, tuple(closed), tuning)


class _MixedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query, key, value, gates, plan, scaling, closed, tuning):
        save = any(ctx.needs_input_grad[:4])
        states = (_adjacent(query), _adjacent(key), _adjacent(value))
        skipped = () if ctx.needs_input_grad[3] else closed
        open_heads = _open_heads(plan, key.shape[1], skipped)
        far = plan.far.forward(_pick(states, open_heads), scaling) if open_heads else None
        output, saved = _forward(states, gates, plan, far, open_heads, scaling, save, tuning)
        if save:
            context = None if far is None else far.context
            log_strides = (0, 0, 0) if far is None else far.log_strides
            ctx.save_for_backward(*states, gates, *saved)
            ctx.rest = (plan, scaling, closed, tuning, context, log_strides, open_heads)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor):
        query, key, value, gates, full, difference, local_log, share = ctx.saved_tensors
        plan, scaling, closed, tuning, context, _, forward_heads = ctx.rest
        gradient = gradient.contiguous()
        states = (query, key, value)
        open_heads = _open_heads(plan, key.shape[1], closed)
        far = None
        if open_heads:
            picked = _pick(states, open_heads)
            groups = query.shape[1] // key.shape[1]
            grad, whole = (_pick_heads(part, open_heads, groups) for part in (gradient, full))
            if len(open_heads) != len(forward_heads):
                among = tuple(forward_heads.index(head) for head in open_heads)
                context = (_pick_heads(context[0], among, groups), *context[1:])
            found = plan.far.backward(picked, grad, whole, context, scaling)
            far = (_adjacent(found[0]), _adjacent(found[1]), _adjacent(found[2]))
        saved = (full, difference, local_log, share)
        grads = _backward(states, gates, gradient, saved, plan, far, open_heads, scaling, tuning)
        return *grads, None, None, None, None


def _adjacent(states: torch.Tensor) -> torch.Tensor:
    return states if states.stride(-1) == 1 else states.contiguous()


def _open_heads(plan: Plan, heads: int, closed: tuple[int, ...]) -> tuple[int, ...]:
    """KV heads that have a far pass."""
    return () if plan.far.mode == "none" else tuple(head for head in range(heads) if head not in closed)


@lru_cache(maxsize=4096)
def _index(numbers: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype).to(device)


def _places(open_heads: tuple[int, ...], heads: int, device: torch.device) -> torch.Tensor:
    """Int32 [KV heads]: place of each head in the far pass, -1 for none."""
    places = tuple(open_heads.index(head) if head in open_heads else -1 for head in range(heads))
    return _index(places, torch.int32, device)


def _pick_heads(states: torch.Tensor, chosen: tuple[int, ...], groups: int) -> torch.Tensor:
    """Dim 1 holds KV heads * groups: those of ``chosen``; the tensor itself when every head is chosen."""
    if len(chosen) * groups == states.shape[1]:
        return states
    index = _index(chosen, torch.int64, states.device)
    return states.unflatten(1, (-1, groups)).index_select(1, index).flatten(1, 2)


def _pick(states: States, chosen: tuple[int, ...]) -> States:
    query, key, value = states
    groups = query.shape[1] // key.shape[1]
    return _pick_heads(query, chosen, groups), _pick_heads(key, chosen, 1), _pick_heads(value, chosen, 1)


def _gate_stride(gates: torch.Tensor) -> int:
    return gates.stride(0) if gates.ndim == 2 else 0


def _forward(
    states: States,
    gates: torch.Tensor,
    plan: Plan,
    far: FarResult | None,
    open_heads: tuple[int, ...],
    scaling: float,
    save: bool,
    tuning: Tuning,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    query, key, value = states
    heads, dim = key.shape[1:]
    groups = query.shape[1] // heads
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    saved: tuple[torch.Tensor, ...] = ()
    full = difference = local_log = share = output
    if save:
        full, difference = torch.empty_like(output), torch.empty_like(output)
        local_log = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        share = torch.empty_like(local_log)
        saved = (full, difference, local_log, share)
    rest_output, rest_log = (output, output) if far is None else (far.output, far.log)
    tile, seats = tuning.forward, _padded(groups)
    forward_kernel[(len(plan.forward_tiles), heads)](
        query, key, value, gates, plan.forward_tiles, _places(open_heads, heads, query.device),
        rest_output, rest_log, output, full, difference, local_log, share,
        plan.window.sink, plan.window.recent, scaling,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], _gate_stride(gates),
        *rest_output.stride()[:2], *((0, 0, 0) if far is None else far.log_strides),
        HEADS=heads, GROUP=groups, SEATS=seats, POSITIONS=max(tile.rows // seats, 1), BLOCK=tile.keys,
        DIM=dim, FIELDS=FIELDS, SAVE=save, WIDE="ieee", num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return output, saved


def _backward(
    states: States,
    gates: torch.Tensor,
    gradient: torch.Tensor,
    saved: tuple[torch.Tensor, ...],
    plan: Plan,
    far: States | None,
    open_heads: tuple[int, ...],
    scaling: float,
    tuning: Tuning,
) -> tuple[torch.Tensor, ...]:
    query, key, value = states
    full, difference, local_log, share = saved
    heads, dim = key.shape[1:]
    groups, device = query.shape[1] // heads, query.device
    grads = [torch.empty(part.shape, dtype=part.dtype, device=device) for part in states]
    log, delta = torch.empty_like(local_log), torch.empty_like(local_log)
    slope = torch.empty(len(plan.query_tiles), heads, dtype=torch.float32, device=device)
    sums = torch.zeros(2, plan.docs, plan.window.sink, heads, dim, dtype=torch.float32, device=device)
    rest_query, rest_key, rest_value = states if far is None else far
    if rest_key.stride() != rest_value.stride():
        rest_key, rest_value = rest_key.contiguous(), rest_value.contiguous()
    places = _places(open_heads, heads, device)
    window = (plan.window.sink, plan.window.recent, scaling)
    strides = (*query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *gradient.stride()[:2])
    tile, seats = tuning.queries, _padded(groups)
    query_gradient_kernel[(len(plan.query_tiles), heads)](
        query, key, value, gates, plan.query_tiles, places, gradient, full, difference, local_log, share,
        rest_query, grads[0], log, delta, slope, *window, *strides, _gate_stride(gates),
        *rest_query.stride()[:2],
        HEADS=heads, GROUP=groups, SEATS=seats, POSITIONS=max(tile.rows // seats, 1), BLOCK=tile.keys,
        DIM=dim, FIELDS=FIELDS, WIDE="ieee", num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    tile = tuning.keys
    key_gradient_kernel[(len(plan.key_tiles), heads)](
        query, key, value, gates, plan.key_tiles, places, gradient, log, delta,
        rest_key, rest_value, grads[1], grads[2], *sums, *window, *strides, _gate_stride(gates),
        *rest_key.stride()[:2],
        HEADS=heads, GROUP=groups, SEATS=seats, POSITIONS=max(tile.rows // seats, 1), BLOCK=tile.keys,
        DIM=dim, FIELDS=FIELDS, WIDE="ieee", num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    for target, sink in zip(grads[1:], sums, strict=True):
        target[plan.sink_rows] = sink.flatten(0, 1)[plan.sink_cells].to(target.dtype)
    if gates.ndim == 1:
        return *grads, slope.sum(0)
    return *grads, torch.zeros_like(gates).index_add_(0, plan.query_docs, slope)
