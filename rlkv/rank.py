"""Choose a sparsity: the smallest that fits a memory budget, or the largest that costs little accuracy.

Both return a :class:`Choice`, whose ``sentence`` says in words what was chosen and why.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlkv.errors import RLKVError
from rlkv.gates import HeadGates
from rlkv.mask import HeadMask
from rlkv.window import Window

GRID = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9)
UNITS = {"": 1, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True)
class Choice:
    """A mask, why it was chosen, and the accuracies measured on the way (true sparsity -> accuracy)."""

    mask: HeadMask
    sentence: str
    tried: dict[float, float] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """The true fraction of local heads."""
        return self.mask.sparsity


def parse_bytes(text: str | int) -> int:
    """Bytes in ``"8GiB"`` (2**30), ``"8GB"`` or ``"8G"`` (10**9), ``"500 MiB"``, ``"123456"``."""
    match = re.fullmatch(r"\s*([\d_]+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", str(text).lower())
    if not match or (match[3] and not match[2]):
        raise RLKVError(f"memory budget: expected a size such as 8GiB or 500MB, got {text!r}")
    power = UNITS[match[2]] if match[2] else 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def format_bytes(count: int | float) -> str:
    """A size in binary units, three digits or so: ``"1.25 GiB"``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def for_budget(
    gates: HeadGates,
    budget: str | int,
    length: int | Sequence[int],
    batch: int = 1,
    *,
    window: Window | None = None,
    bytes_per_value: int | None = None,
    **options: Any,
) -> Choice:
    """The mask with the fewest local heads whose KV cache fits ``budget`` bytes.

    The cache is that of ``batch`` requests of ``length`` tokens each (or of each length in a list).
    ``options`` go to :meth:`HeadGates.mask`. Raises RLKVError if even all heads local don't fit, or if the
    gates record neither head_dim nor window.
    """
    allowed = parse_bytes(budget)
    heads = gates.values.numel()

    def held(local: int) -> tuple[HeadMask, int]:
        mask = gates.mask(local / heads, window=window, **options)
        return mask, mask.kv_bytes(length, batch, bytes_per_value=bytes_per_value)

    # More local heads never hold more, so the first that fits is found by halving.
    local = bisect_left(range(heads + 1), True, key=lambda count: held(count)[1] <= allowed)
    size = f"{batch} x {length} tokens" if isinstance(length, int) else f"{batch} x {list(length)} tokens"
    if local > heads:
        least = held(heads)[1]
        raise RLKVError(
            f"a budget of {format_bytes(allowed)} can't hold {size}: even with every head local the cache "
            f"takes {format_bytes(least)}; lower the batch or the window"
        )
    mask, used = held(local)
    full = mask.full_bytes(length, batch, bytes_per_value=bytes_per_value)
    return Choice(
        mask,
        f"sparsity {mask.sparsity:.3f} is the smallest that holds {size} in {format_bytes(allowed)}: "
        f"{format_bytes(used)} of the full cache's {format_bytes(full)}",
    )


def for_loss(
    gates: HeadGates,
    evaluate: Callable[[HeadMask], float],
    allowed_loss: float,
    *,
    grid: Sequence[float] = GRID,
    patience: int = 2,
    split: str = "dev",
    **options: Any,
) -> Choice:
    """The largest sparsity of ``grid`` whose accuracy is at most ``allowed_loss`` below the full cache's.

    ``evaluate(mask)`` returns an accuracy in [0, 1] on the development split; ``allowed_loss`` is in the same
    unit (0.02 is two points). Sparsities are tried upwards, until ``patience`` of them in a row fail.
    Choosing on the test split would spoil what is reported on it, so ``split="test"`` raises RLKVError.
    """
    if split == "test":
        raise RLKVError("a sparsity is chosen on a development split, never on the test split")
    if not 0 <= allowed_loss <= 1:
        raise RLKVError(f"allowed loss is a fraction within [0, 1] (0.02 is two points); got {allowed_loss}")
    best = gates.mask(0.0, **options)
    baseline = evaluate(best)
    tried = {0.0: baseline}
    failures = 0
    for sparsity in sorted(grid):
        mask = gates.mask(sparsity, **options)
        if mask.sparsity in tried:  # two steps of the grid may round to one mask
            continue
        tried[mask.sparsity] = accuracy = evaluate(mask)
        if baseline - accuracy <= allowed_loss + 1e-12:
            best, failures = mask, 0
        else:
            failures += 1
        if failures == patience:
            break
    chosen = tried[best.sparsity]
    return Choice(
        best,
        f"sparsity {best.sparsity:.3f} is the largest tried that loses at most {allowed_loss:.1%} on the "
        f"{split} split: {chosen:.1%} against {baseline:.1%} with the full cache "
        f"({len(tried) - 1} sparsities tried)",
        tried,
    )
