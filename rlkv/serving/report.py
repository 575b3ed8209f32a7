"""The plan in words, as ``rlkv serve`` and the engine's log print it."""

from __future__ import annotations

from rlkv.rank import format_bytes
from rlkv.serving.plan import Capacity, Plan

LENGTHS = (4096, 32768)


def describe(plan: Plan, lengths: tuple[int, ...] = LENGTHS) -> str:
    """Heads kept, bytes a request, and the gain in concurrency, some lines."""
    mask, tp = plan.mask, plan.tp
    kept = int(mask.full.sum())
    per_layer = mask.per_layer()
    ranks = f" on each of {tp} ranks" if tp > 1 else ""
    lines = [
        f"{kept} of {mask.full.numel()} KV heads full (sparsity {mask.sparsity:.3f}), {min(per_layer)} to "
        f"{max(per_layer)} a layer; local heads keep {plan.window} tokens, prefill {plan.prefill}",
        f"a token: {format_bytes(plan.full_token_bytes)} instead of "
        f"{format_bytes(plan.stock_token_bytes)}{ranks}; a request's window: "
        f"{format_bytes(plan.window.size * plan.local_token_bytes)}",
    ]
    for length in lengths:
        stock = length * plan.stock_token_bytes
        lines.append(
            f"a request of {length} tokens: {format_bytes(plan.request_bytes(length))} instead of "
            f"{format_bytes(stock)}{ranks}, so {plan.gain(length):.2f}x as many fit"
        )
    return "\n".join(lines)


def describe_capacity(plan: Plan, capacity: Capacity) -> str:
    """What was allocated, one line."""
    stock = capacity.total_bytes // plan.stock_token_bytes
    return (
        f"KV memory {format_bytes(capacity.total_bytes)}: {capacity.tokens} tokens (stock: {stock}) in "
        f"{format_bytes(capacity.full_bytes)}, windows of {capacity.requests} requests in "
        f"{format_bytes(capacity.ring_bytes)}, {capacity.staging} tokens of chunked prompts in "
        f"{format_bytes(capacity.staging_bytes)}"
    )


def describe_budget(plan: Plan, budget: int, staging: int = 0, lengths: tuple[int, ...] = LENGTHS) -> str:
    """How many requests of some mean lengths fit into ``budget`` bytes a rank, beside ``staging`` tokens."""
    parts = []
    for length in lengths:
        stock = budget // (length * plan.stock_token_bytes)
        fitting = plan.requests_for(budget, length, staging)
        parts.append(f"{fitting} requests of {length} tokens (stock: {stock})")
    line = f"in {format_bytes(budget)}: {', '.join(parts)}"
    if not staging:
        return line
    area = format_bytes(staging * plan.local_token_bytes)
    return f"{line}; {area} of it are for a prompt of up to {staging} tokens, processed in chunks"
