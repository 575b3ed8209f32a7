"""What the GPU benchmarks share: times of captured graphs, the card's copy bandwidth, tables and JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlkv.errors import RLKVError

HEAD_START = 6_000_000  # cycles: about 3 ms


def need_cuda() -> torch.device:
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    return torch.device("cuda")


def time_graph(work: Callable[[], Any], rounds: int = 12) -> float:
    """Median seconds of one replay of ``work`` as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return time_calls(graph.replay, rounds)


def time_calls(work: Callable[[], Any], rounds: int = 12, warm: int = 3) -> float:
    """Median seconds of one call on the device, by events; the host gets ahead while it is kept busy."""
    for _ in range(warm):
        work()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes a second that a large device copy reads and writes."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / time_calls(lambda: target.copy_(source))


def relative_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """||found - reference|| / ||reference||, NaN included."""
    reference = reference.double()
    return ((found.double() - reference).norm() / reference.norm().clamp(min=1e-30)).item()


def require(error: float, limit: float, what: str) -> None:
    if not error <= limit:
        raise RLKVError(f"{what}: relative error {error:.2e} is above {limit:.2e}; not timed")


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Columns in the order of the first row's keys."""
    shown = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    head = list(rows[0])
    widths = [max(len(line[i]) for line in [head, *shown]) for i in range(len(head))]
    for line in [head, *shown]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), flush=True)


def write_json(path: str | None, result: Mapping[str, Any]) -> None:
    if path:
        Path(path).write_text(json.dumps(result, indent=1) + "\n")


def card() -> dict[str, str]:
    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
