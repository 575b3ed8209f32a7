"""How much of the card a phase of a benchmark takes."""

from __future__ import annotations

import gc
from typing import Any

import torch


class MemoryWatch:
    """From here on, in GiB: PyTorch's peaks, and the least that the card had free whenever it was looked at.

    "peak" counts tensors; "reserved" is what PyTorch held from the card for them; what is missing from "least
    free" also counts the CUDA context, kernels and libraries, and other processes. Unused memory is given
    back first, so that no phase is charged for the one before. Without a GPU everything is 0.
    """

    def __init__(self) -> None:
        self._least = float("inf")
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def look(self, *_: Any) -> None:
        """Note what the card has free; also a callback."""
        if torch.cuda.is_available():
            self._least = min(self._least, torch.cuda.mem_get_info()[0])

    def figures(self, phase: str = "") -> dict[str, float]:
        """The three figures so far, each name preceded by ``phase``."""
        found = dict.fromkeys(("peak", "reserved", "least free"), 0.0)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.look()
            peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), self._least)
            found = dict(zip(found, peaks, strict=True))
        return {f"{phase}{name} GiB": size / 2**30 for name, size in found.items()}
