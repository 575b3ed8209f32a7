"""CUDA graphs of the decode step: one launch instead of some hundred, one graph for each shape of step."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from rlkv.errors import RLKVError


def takes_graphs(asked: bool | None, device: torch.device, kernels: bool = True) -> bool:
    """Whether a decode step on ``device`` is captured; ``asked`` None: wherever it can be.

    ``kernels``: whether the step attends by kernels; plain PyTorch's decoder waits for the device.
    Raises RLKVError where graphs are asked for and impossible.
    """
    if asked and device.type != "cuda":
        raise RLKVError(f"sampler: cuda_graphs=True needs a model on CUDA, it is on {device}")
    if asked and not kernels:
        raise RLKVError("sampler: cuda_graphs=True needs the Triton kernels, which can't take this sampler")
    return asked is not False and device.type == "cuda" and kernels


class StepGraphs:
    """Runs a step the first time, captures it the second time, replays it from then on.

    A step must read and write tensors that stay in place, wait for nothing, and do the same for the same key.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._seen: set[Hashable] = set()
        self._pool: Any = None
        self._made_for: tuple[Any, ...] = ()

    def refresh(self, *others: torch.Tensor) -> None:
        """Forget graphs of weights, or ``others``, which have since moved, and of what was attached since."""
        places = [tensor.data_ptr() for tensor in (*self._model.parameters(), *others)]
        made_for = (*places, *_attached(self._model))
        if made_for != self._made_for:
            self._made_for = made_for
            self._graphs.clear()
            self._seen.clear()
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


def _attached(model: torch.nn.Module) -> list[Any]:
    """What decides a forward besides its weights: the modules' classes, replaced forwards and hooks."""
    return [
        part
        for module in model.modules()
        for part in (
            type(module),
            vars(module).get("forward"),
            *module._forward_pre_hooks.values(),
            *module._forward_hooks.values(),
        )
    ]
