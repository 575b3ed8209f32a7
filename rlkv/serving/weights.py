"""Checkpoints permuted so that each rank's full heads come first in a layer: the same model, other row order.

    for name, tensor in permuted(plan, checkpoint): ...

Works on the tensors of a checkpoint, by their names and before an engine fuses, shards or repacks them: Q, K
and V by rows (weight, bias, scales), O by columns, and norms that are as wide as all heads. Quantised
formats: FP8 and INT8 with scales per tensor, channel or block, AWQ (int32 words of eight 4-bit columns), GPTQ
without act-order. Embeddings, MLPs and norms of one head are untouched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch

from rlkv.errors import RLKVError
from rlkv.serving.plan import Plan

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NAME = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.(q_proj|k_proj|v_proj|o_proj|q_norm|k_norm)\.(\w+)$")
_FUSED = re.compile(r"\.layers\.\d+\.self_attn\.(qkv_proj|W_pack|query_key_value)\.")
_TRANSPOSED = ("qweight", "qzeros", "scales")  # AWQ and GPTQ store [in, out]
_PER_TENSOR = ("weight_shape", "weight_scale_2")  # beside whatever has one element


def permuted(
    plan: Plan, tensors: Iterable[tuple[str, torch.Tensor]], names: set[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same named tensors with the heads of each attention layer in ``plan.order``.

    Raises RLKVError for fused QKV tensors, and for a shape in which the heads can't be found; if ``tensors``
    is a list, before anything of it is given out. ``names`` collects what passed: see :func:`missing`.
    """
    if isinstance(tensors, list):
        for name, tensor in tensors:
            index = name.endswith("g_idx")  # the one kind whose values are looked at
            permute(plan, name, tensor if index else torch.empty_like(tensor, device="meta"))
    for name, tensor in tensors:
        if names is not None:
            names.add(name)
        yield name, permute(plan, name, tensor)


def missing(plan: Plan, names: Iterable[str]) -> list[str]:
    """Projections with heads to move that were not among the tensors ``names``: layers.0.self_attn.q_proj."""
    came = {(int(match[1]), match[2]) for match in map(_NAME.search, names) if match}
    return [
        f"layers.{layer}.self_attn.{module}"
        for layer, order in enumerate(plan.order)
        for module in PROJECTIONS
        if (layer, module) not in came and not _in_place(order)
    ]


def permute(plan: Plan, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """One checkpoint tensor with its heads in ``plan.order``; unchanged if it has none."""
    if _FUSED.search(name):
        raise RLKVError(f"{name}: fused QKV checkpoints can't be permuted; convert to q_proj, k_proj, v_proj")
    match = _NAME.search(name)
    if match is None:
        return tensor
    layer, module, kind = int(match[1]), match[2], match[3]
    if layer >= plan.shape.layers:
        return tensor  # a draft head beyond the model's layers
    order = plan.order[layer]
    if _in_place(order):
        return tensor
    if kind == "g_idx":
        return _checked_g_idx(name, tensor, inputs_have_heads=module == "o_proj")
    if kind in _PER_TENSOR or tensor.numel() == 1:
        return tensor
    if module in ("q_norm", "k_norm"):
        return _permute_norm(plan, name, tensor, order, query=module == "q_norm")
    if module == "o_proj" and (kind == "bias" or (kind == "weight_scale" and tensor.numel() == len(tensor))):
        return tensor  # of the layer's output, which is not split into heads
    axis = 1 if module == "o_proj" else 0
    if kind in _TRANSPOSED:
        axis = 1 - axis
    query = module in ("q_proj", "o_proj")
    return _permute_axis(plan, name, tensor, order, axis, query)


def _in_place(order: torch.Tensor) -> bool:
    return torch.equal(order, torch.arange(len(order)))


def _permute_axis(
    plan: Plan, name: str, tensor: torch.Tensor, order: torch.Tensor, axis: int, query: bool
) -> torch.Tensor:
    """Move whole blocks of ``axis``: a KV head's own block, or that of its query heads in their order.

    A packed or block-scaled axis is shorter than its rows; what matters is that no word or block straddles
    two heads.
    """
    heads, groups = plan.shape.kv_heads, plan.groups
    rows = heads * plan.shape.head_dim * (groups if query else 1)
    length = tensor.shape[axis] if axis < tensor.ndim else 0
    if length == 1:
        return tensor  # one scale for all heads
    if not length or rows % length or length % heads:
        raise RLKVError(
            f"{name} has {length} entries for {rows} rows of {heads} KV heads: a packed word or quantisation "
            "group straddles two heads, so they can't be permuted"
        )
    blocks = tensor.unflatten(axis, (heads, length // heads))
    return blocks.index_select(axis, order.to(tensor.device)).flatten(axis, axis + 1)


def _permute_norm(
    plan: Plan, name: str, tensor: torch.Tensor, order: torch.Tensor, query: bool
) -> torch.Tensor:
    if tensor.numel() == plan.shape.head_dim:
        return tensor  # one norm for every head
    return _permute_axis(plan, name, tensor, order, 0, query)


def _checked_g_idx(name: str, tensor: torch.Tensor, inputs_have_heads: bool) -> torch.Tensor:
    """GPTQ's group of each input row; act-order (not rising) ties rows of different heads together."""
    if inputs_have_heads and bool((tensor[1:] < tensor[:-1]).any()):
        raise RLKVError(f"{name}: GPTQ with act-order (desc_act) can't be permuted; use a model without it")
    return tensor
