"""CUDA graphs of the decode step: one launch instead of some hundred, one graph for each shape of step."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch


class StepGraphs:
    """Runs a step the first time, captures it the second time, replays it from then on.

    A step must read and write tensors that stay in place, wait for nothing, and do the same for the same key.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._seen: set[Hashable] = set()
        self._pool: Any = None
        self._places: tuple[int, ...] = ()

    def refresh(self, *others: torch.Tensor) -> None:
        """Forget graphs that read weights, or ``others``, which have since moved elsewhere."""
        places = tuple(tensor.data_ptr() for tensor in (*self._model.parameters(), *others))
        if places != self._places:
            self._places = places
            self._graphs.clear()
            self._pool = None  # goes with its graphs

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        if key not in self._seen:  # libraries set themselves up outside a capture
            self._seen.add(key)
            step()
            return
        if key not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                step()
            self._graphs[key], self._pool = graph, graph.pool()
        self._graphs[key].replay()
