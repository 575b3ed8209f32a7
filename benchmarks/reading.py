"""What reading alone takes: a kernel that sums up as many bytes as attention must read, launched as often."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from gpu_timing import time_graph
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

CHUNK = 8192  # elements that a program reads at once


@triton.jit(do_not_specialize=["begin", "chunks", "there"])
def read_kernel(source, sums, begin, chunks, there, CHUNK: tl.constexpr):
    gdc_launch_dependents()
    at = tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK], tl.float32)
    gdc_wait()
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        total += tl.load(source + ((begin + chunk) % there).to(tl.int64) * CHUNK + at).to(tl.float32)
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


def reading_seconds(source: torch.Tensor, sizes: list[int], steps: int) -> float:
    """One step: a launch for each of ``sizes`` bytes, out of ``source`` (contiguous), elsewhere each time.

    Launches overlap as ours do; eight programs a multiprocessor were the fastest of 1, 2, 4 and 8.
    """
    programs = 8 * torch.cuda.get_device_properties(source.device).multi_processor_count
    sums = torch.empty(programs, device=source.device)
    flat = source.flatten()
    there = len(flat) // CHUNK
    chunks = [-(-size // (CHUNK * flat.element_size())) for size in sizes]

    def work() -> None:
        begin = 0
        for count in chunks * steps:
            read_kernel[(programs,)](
                flat, sums, begin, count, there, CHUNK=CHUNK, num_warps=4, launch_pdl=True
            )
            begin = (begin + count) % there

    return time_graph(work) / steps
