"""The division of a decoding step among programs, for all layers, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SHARE = 8  # numbers a program


@triton.jit
def place_block(block, count, gate, sink, recent, BLOCK: tl.constexpr, SOFT: tl.constexpr):
    """How many blocks are read of a row, and which block of it is the one read as number ``block``."""
    blocks = tl.maximum((count + BLOCK - 1) // BLOCK, 1)
    place = block
    if SOFT:  # a row whose gate is 0 reads what touches its window
        first = tl.minimum((sink + BLOCK - 1) // BLOCK, blocks)
        skipped = tl.maximum(first, tl.maximum(count - recent, 0) // BLOCK) - first
        skipped = tl.where(gate == 0.0, skipped, 0)
        blocks -= skipped
        place += tl.where(block < first, 0, skipped)
    return blocks, place


@triton.jit
def _row_of(ends, block, rows, BITS: tl.constexpr):
    """The row that holds a block, and the block at which it begins; by bisection."""
    row = block * 0
    for bit in tl.static_range(0, BITS):
        step = 1 << (BITS - 1 - bit)
        end = tl.load(ends + row + step - 1, mask=row + step < rows, other=2147483647)
        row = tl.where(end <= block, row + step, row)
    return row, tl.load(ends + row - 1, mask=row > 0, other=0)


@triton.jit
def _owner(block, total, sharers):
    """The program whose share holds a block."""
    return ((block + 1) * sharers - 1) // total


@triton.jit(
    do_not_specialize=["rows", "programs", "least", "sink", "recent", "kv_heads", "gate_n", "gate_layer"]
)
def plan_kernel(
    counts,  # int32 [layers, rows]
    gates,  # float32 [n, layers, kv_heads], SOFT only
    row_gates,  # float32 [layers, rows], SOFT only
    ends,  # int32 [layers, rows], scratch
    shares,  # int32 [layers, programs, SHARE]
    rows,
    programs,
    least,
    sink,
    recent,
    kv_heads,
    gate_n,
    gate_layer,
    BITS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFT: tl.constexpr,
    SHARE: tl.constexpr,
):
    """One layer: the blocks of all rows, end to end, cut into shares that differ by one at most.

    Cuts within a block would make shares of equal tokens, but a block costs its latency whatever it holds.
    """
    layer = tl.program_id(0)
    counts += layer * rows
    ends += layer * rows
    at = tl.arange(0, 1 << BITS)
    there = at < rows
    count = tl.load(counts + at, mask=there, other=0)
    gate = 1.0
    if SOFT:
        gate = tl.load(gates + layer * gate_layer + at // kv_heads * gate_n + at % kv_heads, mask=there)
        tl.store(row_gates + layer * rows + at, gate, mask=there)
    blocks, _ = place_block(0, count, gate, sink, recent, BLOCK, SOFT)
    blocks = tl.where(there, blocks, 0)
    total = tl.sum(blocks, 0)
    tl.store(ends + at, tl.cumsum(blocks, 0), mask=there)
    tl.debug_barrier()
    sharers = tl.minimum(tl.maximum(total // least, 1), programs)
    program = tl.arange(0, PROGRAMS)
    first = tl.minimum(program, sharers) * total // sharers
    after = tl.minimum(program + 1, sharers) * total // sharers
    works = after > first
    first_row, first_start = _row_of(ends, tl.minimum(first, total - 1), rows, BITS)
    last_row, _ = _row_of(ends, tl.maximum(after, 1) - 1, rows, BITS)
    begins = _owner(first_start, total, sharers)
    parts = _owner(tl.load(ends + first_row) - 1, total, sharers) - begins + 1
    last_parts = _owner(tl.load(ends + last_row) - 1, total, sharers) - program + 1
    last_shared = works & (last_row != first_row) & (last_parts > 1)
    share = shares + (layer * programs + program) * SHARE
    inside = program < programs
    tl.store(share, first_row, mask=inside)
    tl.store(share + 1, tl.where(works, first - first_start, 0), mask=inside)
    tl.store(share + 2, after - first, mask=inside)
    tl.store(share + 3, tl.load(counts + first_row), mask=inside)
    tl.store(share + 4, tl.load(counts + tl.minimum(first_row + 1, rows - 1)), mask=inside)
    tl.store(share + 5, begins, mask=inside)
    tl.store(share + 6, tl.where(works & (parts > 1), parts, 0), mask=inside)
    tl.store(share + 7, tl.where(last_shared, last_parts, 0), mask=inside)


def make_shares(
    counts: torch.Tensor,
    gates: torch.Tensor | None,
    window: tuple[int, int],
    block: int,
    programs: int,
    least: int,
    most: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Shares int32 [layers, programs, 8] and the rows' gates float32 [layers, rows]; see DecodePlan.

    ``counts`` int32 [layers, n, kv_heads], contiguous; ``gates`` float32 [n, layers, kv_heads] or None;
    ``window``: sink and recent; ``least``: fewest blocks of a program; ``most``: rows that there can be, for
    one compilation whatever the batch.
    """
    layers, requests, kv_heads = counts.shape
    rows = requests * kv_heads
    shares = torch.empty(layers, programs, SHARE, dtype=torch.int32, device=counts.device)
    ends = torch.empty(layers, rows, dtype=torch.int32, device=counts.device)
    row_gates = None if gates is None else torch.empty(layers, rows, device=counts.device)
    plan_kernel[(layers,)](
        counts,
        counts if gates is None else gates,
        ends if row_gates is None else row_gates,
        ends,
        shares,
        rows,
        programs,
        least,
        *window,
        kv_heads,
        0 if gates is None else gates.stride(0),
        0 if gates is None else gates.stride(1),
        BITS=(most - 1).bit_length(),
        PROGRAMS=triton.next_power_of_2(programs),
        BLOCK=block,
        SHARE=SHARE,
        SOFT=gates is not None,
        num_warps=8,
    )
    return shares, row_gates
