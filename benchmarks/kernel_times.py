"""Where the device's time goes: milliseconds by kind of kernel, and the gaps between kernels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

KINDS = {  # words in the names of kernels
    "window attention": ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel"),
    "far attention": ("sdpa", "fmha", "flash", "cudnn_generated", "cudnn::fusion"),
    "decode attention": ("decode_kernel",),
    "products": ("nvjet", "gemm", "cutlass", "splitK"),
    "steps between": ("add_norm", "rotary", "silu_times", "store_kernel"),
    "vocabulary": ("_chosen_kernel", "_draw_kernel", "oftMax", "oftmax"),
    "copies": ("copy", "Memcpy", "Memset", "CatArray", "FillFunctor"),
}


def kernel_times(work: Callable[[], Any], top: int = 20) -> dict[str, float]:
    """Milliseconds by kind; "span" from the first kernel's start to the last one's end, "idle" of it.

    Prints the ``top`` kernels. Without a GPU, nothing.
    """
    with torch.profiler.profile() as found:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    kernels = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if not kernels:
        return {}
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        by_name[event.name].append(event.time_range.elapsed_us() / 1e3)
    times: dict[str, float] = dict.fromkeys([*KINDS, "other"], 0.0)
    for name, took in sorted(by_name.items(), key=lambda item: -sum(item[1])):
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")
        times[kind] += sum(took)
        if top > 0:
            print(f"{sum(took):9.2f} ms {len(took):6}  {kind}: {name[:90]}")
            top -= 1
    first = min(event.time_range.start for event in kernels)
    span = (max(event.time_range.end for event in kernels) - first) / 1e3
    return {"span": span, **times, "idle": span - sum(times.values())}
