"""Which KV heads stay full: a ranking of scores cut at a sparsity, and the bytes that a request then holds.

Heads are ranked over all layers together (paper section 3.3); ties are broken by a permutation drawn from a
seed that the mask records, as is the true sparsity, which differs from the requested one by rounding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlkv.errors import RLKVError
from rlkv.files import write_atomically
from rlkv.support import ModelShape, check_fit
from rlkv.window import Window

ROUNDINGS = ("global", "layer")


@dataclass(frozen=True, eq=False)
class HeadMask:
    """``full`` bool [layers, kv_heads], True for a full head; the rest says how it was made and for what."""

    full: torch.Tensor
    window: Window | None = None  # deployed
    model: ModelShape | None = None
    requested: float | None = None  # sparsity asked for
    seed: int | None = None  # of the tie-breaking permutation
    rounding: str = "global"
    tp: int = 1

    def __post_init__(self) -> None:
        full = torch.as_tensor(self.full)
        if full.ndim != 2 or not full.numel() or full.dtype != torch.bool:
            raise RLKVError(
                f"mask: expected a bool table [layers, kv_heads], got {full.dtype} {list(full.shape)}"
            )
        object.__setattr__(self, "full", full.detach().cpu())
        if self.model is not None:
            self.check(self.model)

    @classmethod
    def from_scores(
        cls,
        scores: torch.Tensor,
        sparsity: float,
        *,
        seed: int = 0,
        rounding: str = "global",
        tp: int = 1,
        window: Window | None = None,
        model: ModelShape | None = None,
    ) -> HeadMask:
        """Keep the round((1 - sparsity) * layers * heads) heads of highest score full.

        scores: real [layers, kv_heads], finite. ``rounding="layer"`` keeps the same number in every layer.
        ``tp=n`` keeps a multiple of n in every layer, so that n tensor-parallel ranks can hold equal numbers;
        of all such masks of that size it is one that differs from the plain ranking in the fewest heads.
        Raises RLKVError for a sparsity outside [0, 1], scores that are not finite, a wrong tp or rounding.
        """
        if not 0 <= sparsity <= 1:
            raise RLKVError(f"sparsity is the fraction of heads made local, within [0, 1]; got {sparsity}")
        if rounding not in ROUNDINGS:
            raise RLKVError(f"rounding must be one of {', '.join(ROUNDINGS)}; got {rounding!r}")
        layers, heads = scores.shape
        if tp < 1 or heads % tp:
            raise RLKVError(f"tp={tp} does not divide the {heads} KV heads of a layer")
        if not scores.isfinite().all():
            raise RLKVError("scores must be finite numbers; found NaN or infinity")
        ranks = rank_heads(scores, seed)
        if rounding == "layer":
            kept = tp * round((1 - sparsity) * heads / tp)
            full = ranks.argsort(dim=1).argsort(dim=1) < kept
        else:
            full = _keep_blocks(ranks, round((1 - sparsity) * ranks.numel()), tp)
        return cls(full, window, model, float(sparsity), seed, rounding, tp)

    @classmethod
    def random(cls, layers: int, heads: int, sparsity: float, seed: int = 0, **options: Any) -> HeadMask:
        """A random mask: all heads tie, so the seed alone ranks them. Options as in :meth:`from_scores`."""
        return cls.from_scores(torch.zeros(layers, heads), sparsity, seed=seed, **options)

    @property
    def sparsity(self) -> float:
        """The true fraction of local heads."""
        return 1 - self.full.sum().item() / self.full.numel()

    def per_layer(self) -> list[int]:
        """Full heads in each layer."""
        return self.full.sum(dim=1).tolist()

    def gates(self) -> torch.Tensor:
        """Float32 [layers, kv_heads]: 1 for full heads, 0 for local ones."""
        return self.full.float()

    def check(self, model: Any) -> ModelShape:
        """The model's shape; raises RLKVError if this mask has another shape or was made for another."""
        return check_fit("mask", self.full.shape, self.model, model)

    def remarks(self, window: Window) -> list[str]:
        """What a user should know before this mask is used with ``window``; a line each."""
        if self.window in (None, window) or self.full.all():
            return []
        return [f"WARNING: a mask made for window {self.window} is used with {window}."]

    def kv_bytes(
        self,
        length: int | Sequence[int],
        batch: int = 1,
        *,
        window: Window | None = None,
        bytes_per_value: int | None = None,
    ) -> int:
        """Bytes of keys and values held after ``length`` tokens (one length, or one for each request).

        Full heads hold every token, local heads the window. ``batch`` requests of each length;
        ``bytes_per_value`` (2 for bfloat16) and ``window`` default to the mask's own.
        Raises RLKVError when the mask knows no head_dim or no window.
        """
        window = window or self.window
        full = int(self.full.sum())
        local = self.full.numel() - full
        if window is None:
            if local:
                raise RLKVError("mask: no window recorded; pass window=Window(16, 64), say")
            window = Window(0, 1)
        tokens = sum(full * n + local * window.held(n) for n in _lengths(length))
        return tokens * batch * self._bytes_per_token(bytes_per_value)

    def full_bytes(
        self, length: int | Sequence[int], batch: int = 1, *, bytes_per_value: int | None = None
    ) -> int:
        """Bytes that the base model's cache holds for the same requests."""
        tokens = self.full.numel() * sum(_lengths(length))
        return tokens * batch * self._bytes_per_token(bytes_per_value)

    def _bytes_per_token(self, bytes_per_value: int | None) -> int:
        if self.model is None:
            raise RLKVError(
                "mask: no model is recorded, so its head_dim is unknown; name the model (model=...)"
            )
        per_token = self.model.bytes_per_token
        return per_token if bytes_per_value is None else 2 * self.model.head_dim * bytes_per_value

    def save(self, path: str | Path) -> Path:
        """Write JSON, atomically."""
        record = {
            "requested": self.requested,
            "sparsity": self.sparsity,
            "seed": self.seed,
            "ties": "torch.randperm of layers * heads with the seed, then a stable sort",
            "rounding": self.rounding,
            "tp": self.tp,
            "window": str(self.window) if self.window else None,
            "model": self.model.to_dict() if self.model else None,
            "full": self.full.int().tolist(),
        }
        write_atomically(Path(path), json.dumps(record) + "\n")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> HeadMask:
        """Read what :meth:`save` wrote; raises RLKVError for a missing file or one that is not a mask."""
        path = Path(path)
        if not path.is_file():
            raise RLKVError(f"{path}: no such mask file")
        try:
            record = json.loads(path.read_text())
            table = torch.tensor(record["full"], dtype=torch.int64)
            if not ((table == 0) | (table == 1)).all():
                raise ValueError("full must hold 0 and 1 only")
            window, model = record["window"], record["model"]
            mask = cls(
                table.bool(),
                Window.parse(window) if window else None,
                ModelShape.from_dict(model) if model else None,
                record["requested"],
                record["seed"],
                record["rounding"],
                record["tp"],
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RLKVError(f"{path}: not a head mask ({error})") from None
        return mask


def rank_heads(scores: torch.Tensor, seed: int) -> torch.Tensor:
    """Rank of each head over all layers, 0 for the highest score: int64 [layers, heads].

    Equal scores are ordered by a permutation drawn from ``seed``.
    """
    shuffle = torch.randperm(scores.numel(), generator=torch.Generator().manual_seed(seed))
    flat = scores.detach().cpu().reshape(-1)
    order = shuffle[flat[shuffle].argsort(descending=True, stable=True)]
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order))
    return ranks.reshape(scores.shape)


def _keep_blocks(ranks: torch.Tensor, kept: int, tp: int) -> torch.Tensor:
    """Keep about ``kept`` heads, a multiple of ``tp`` in each layer; ``tp`` = 1 is the plain ranking.

    A layer's heads, best first, fall into blocks of ``tp``. The plain ranking keeps 0 … tp heads of a block;
    keeping the blocks of which it keeps most changes the fewest heads. Blocks that tie go by their ranks.
    """
    layers, heads = ranks.shape
    order = ranks.argsort(dim=1)
    blocks = ranks.gather(1, order).reshape(-1, tp)  # [layers * heads / tp, tp]
    overlap = (blocks < kept).sum(1)
    cost = blocks.sum(1) - overlap * ranks.numel() * tp  # overlap first, then summed rank
    chosen = torch.zeros(len(blocks), dtype=torch.bool)
    chosen[cost.argsort(stable=True)[: round(kept / tp)]] = True
    kept_sorted = chosen.repeat_interleave(tp).reshape(layers, heads)
    return torch.zeros(layers, heads, dtype=torch.bool).scatter(1, order, kept_sorted)


def _lengths(length: int | Sequence[int]) -> Sequence[int]:
    lengths = [length] if isinstance(length, int) else length
    if any(n < 0 for n in lengths):
        raise RLKVError(f"a length is a number of tokens, 0 or more; got {min(lengths)}")
    return lengths
