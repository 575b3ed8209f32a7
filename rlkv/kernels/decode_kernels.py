"""The device code of ``decode.py``."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rlkv.kernels.decode_merge import merge, mix
from rlkv.kernels.decode_plan import place_block


@triton.jit
def _advance(
    row,
    block,
    count,
    gate,
    next_count,
    next_gate,
    rows,
    sink,
    recent,
    BLOCK: tl.constexpr,
    SOFT: tl.constexpr,
):
    """The block after this one: (its row, number in it, the row's count and gate)."""
    blocks, _ = place_block(block, count, gate, sink, recent, BLOCK, SOFT)
    ends = block + 1 == blocks
    row = tl.where(ends, tl.minimum(row + 1, rows - 1), row)
    if SOFT:
        gate = tl.where(ends, next_gate, gate)
    return row, tl.where(ends, 0, block + 1), tl.where(ends, next_count, count), gate


@triton.jit
def _look_up(counts, gates, row, rows, SOFT: tl.constexpr):
    """Count and gate of the row after this one."""
    row = tl.minimum(row + 1, rows - 1)
    gate = 0.0
    if SOFT:
        gate = tl.load(gates + row)
    return tl.load(counts + row), gate


@triton.jit
def _pages(
    table, stride, row, block, count, gate, sink, recent,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """The page of a block, or that of each of its tokens if pages are smaller."""
    _, place = place_block(block, count, gate, sink, recent, BLOCK, SOFT)
    pages = table + row.to(tl.int64) * stride
    if PAGE >= BLOCK:
        return tl.load(pages + place * BLOCK // PAGE)
    else:
        position = place * BLOCK + tl.arange(0, BLOCK)
        return tl.load(pages + position // PAGE, mask=position < count, other=0)


@triton.jit
def _cells(
    page, block, count, gate, sink, recent, PAGE: tl.constexpr, BLOCK: tl.constexpr, SOFT: tl.constexpr
):
    """Where a block begins in memory, in tokens, or where each of its tokens is if pages are smaller."""
    _, place = place_block(block, count, gate, sink, recent, BLOCK, SOFT)
    if PAGE > BLOCK:
        return page.to(tl.int64) * PAGE + place * BLOCK % PAGE
    elif PAGE == BLOCK:
        return page.to(tl.int64) * PAGE
    else:
        return page.to(tl.int64) * PAGE + (place * BLOCK + tl.arange(0, BLOCK)) % PAGE


@triton.jit
def _prefetch(
    keys, values, pages, block, count,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Ask for some blocks of a row to come to the L2 cache, where a later store still reaches them.

    A thread asks for a page, or a block's part of it, by one instruction (Hopper).
    """
    BYTES: tl.constexpr = keys.dtype.element_ty.primitive_bitwidth // 8
    RUN: tl.constexpr = min(PAGE, BLOCK)  # tokens that lie together
    RUNS: tl.constexpr = BLOCKS * BLOCK // RUN
    at = tl.arange(0, max(2 * RUNS, 128))  # one a thread at least, or threads would ask again
    position = block * BLOCK + at // 2 * RUN
    tokens = tl.where(at < 2 * RUNS, tl.minimum(count - position, RUN), 0)
    page = tl.load(pages + position // PAGE, mask=tokens > 0, other=0)
    place = (page.to(tl.int64) * PAGE + position % PAGE) * DIM
    run = tl.where(at % 2 == 0, (keys + place).to(tl.int64), (values + place).to(tl.int64))
    tl.inline_asm_elementwise(
        "{ .reg .pred some; setp.gt.s32 some, $2, 0;"
        " @some cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [run, tokens * (DIM * BYTES)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(
    do_not_specialize=["sink", "recent", "rows", "kv_heads", "stride"],
    do_not_specialize_on_alignment=["table", "counts", "gates", "scales", "shares", "arrivals"],
)  # one compilation for all batch sizes and layers
def decode_kernel(
    query,  # [rows, GROUP, DIM], row = request * kv_heads + head
    keys,  # [pages, PAGE, DIM]
    values,
    table,  # int32 [rows, most pages of a row]
    output,  # like query
    counts,  # int32 [rows]
    gates,  # float32 [rows], SOFT only
    scales,  # float32 [2, kv_heads] of stored keys and values, SCALED only
    shares,  # int32 [programs, SHARE]: see DecodePlan
    part_values,  # float32 [2 * programs, BRANCHES * GROUP_TILE, DIM]
    part_logs,  # float32 [2 * programs, BRANCHES * GROUP_TILE]
    arrivals,  # int32 [rows], zeros before and after
    scale,
    sink,
    recent,
    rows,
    kv_heads,
    stride,  # of the table
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    TILES: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    SOFT: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    PARTS: tl.constexpr,
    EARLY: tl.constexpr,
    AHEAD: tl.constexpr,
    SHARE: tl.constexpr,
):
    """Every program takes a share of all rows' blocks; the last to finish a shared row merges it.

    One loop runs through the share, whatever rows it holds, so that keys of the next row are on their way
    while this row ends. Soft gates: the queries stand in the tile twice, to see the window's keys and the
    others.
    """
    BRANCHES: tl.constexpr = 2 if SOFT else 1
    QUERIES: tl.constexpr = TILES * GROUP_TILE
    dtype: tl.constexpr = query.dtype.element_ty
    if EARLY:
        gdc_launch_dependents()
    program = tl.program_id(0)
    share = shares + program * SHARE
    row = tl.load(share)
    block = tl.load(share + 1)
    todo = tl.load(share + 2)
    count = tl.load(share + 3)
    next_count = tl.load(share + 4)
    first_part = tl.load(share + 5)
    first_parts = tl.load(share + 6)
    last_parts = tl.load(share + 7)
    at_query = tl.arange(0, QUERIES)
    at_key = tl.arange(0, BLOCK)
    at_dim = tl.arange(0, DIM)
    branch = at_query // GROUP_TILE
    group = at_query % GROUP_TILE
    real = (group < GROUP) & (branch < BRANCHES)
    inside = real[:, None] & (at_dim[None, :] < DIM)
    tile = group[:, None] * DIM + at_dim[None, :]
    first_row = row
    gate = 0.0
    next_gate = 0.0
    if SOFT:
        gate = tl.load(gates + row)
        next_gate = tl.load(gates + tl.minimum(row + 1, rows - 1))
    page = _pages(table, stride, row, block, count, gate, sink, recent, PAGE, BLOCK, SOFT)
    if EARLY:  # noqa: SIM102
        if todo > 0:
            _, place = place_block(block, count, gate, sink, recent, BLOCK, SOFT)
            _prefetch(keys, values, table + row.to(tl.int64) * stride, place, count, PAGE, BLOCK, DIM, AHEAD)
    found = _cells(page, block, count, gate, sink, recent, PAGE, BLOCK, SOFT)
    next_row, next_block, next_count, next_gate = _advance(
        row, block, count, gate, next_count, next_gate, rows, sink, recent, BLOCK, SOFT
    )
    next_page = _pages(
        table, stride, next_row, next_block, next_count, next_gate, sink, recent, PAGE, BLOCK, SOFT
    )
    later_count, later_gate = _look_up(counts, gates, next_row, rows, SOFT)
    if EARLY:  # so far nothing was read that the kernel before this one may have written
        gdc_wait()
    high = tl.full([QUERIES], float("-inf"), tl.float32)
    mass = tl.zeros([QUERIES, BLOCK], tl.float32)  # summed up at the row's end
    sum_v = tl.zeros([QUERIES, DIM], tl.float32)
    began = (block == 0).to(tl.int32)  # whether this program has the row's first block
    for step in range(0, todo):
        blocks, place = place_block(block, count, gate, sink, recent, BLOCK, SOFT)
        start = place * BLOCK
        valid = at_key < count - start
        if PAGE >= BLOCK:
            from_keys = keys + found * DIM + (at_key[:, None] * DIM + at_dim[None, :])
            from_values = values + found * DIM + (at_key[:, None] * DIM + at_dim[None, :])
        else:
            from_keys = keys + (found[:, None] * DIM + at_dim[None, :])
            from_values = values + (found[:, None] * DIM + at_dim[None, :])
        k = tl.load(from_keys, mask=valid[:, None], other=0.0)
        v = tl.load(from_values, mask=valid[:, None], other=0.0)
        q = tl.load(query + row.to(tl.int64) * (GROUP * DIM) + tile, mask=inside, other=0.0)
        row_scale = scale
        if SCALED:
            row_scale = scale * tl.load(scales + row % kv_heads)
        scores = tl.dot(q, tl.trans(k.to(dtype)), input_precision=WIDE) * row_scale
        if SOFT:
            near = (at_key < sink - start) | (at_key >= count - recent - start)
            seen = valid[None, :] & (near[None, :] == (branch == 0)[:, None])
        else:
            seen = valid[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        above = tl.maximum(high, tl.max(scores, 1))
        shift = tl.where(above == float("-inf"), 0.0, above)  # nothing seen yet
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(high - shift)
        high = above
        mass = mass * shrink[:, None] + weights
        sum_v = tl.dot(weights.to(dtype), v.to(dtype), sum_v * shrink[:, None], input_precision=WIDE)

        ends = block + 1 == blocks
        if ends | (step + 1 == todo):
            total = tl.sum(mass, 1)
            some = tl.where(total > 0, total, 1.0)
            mean = sum_v * (1.0 / some)[:, None]
            log = tl.where(total > 0, high + tl.log2(some), float("-inf"))
            if ends & (began != 0):
                if SCALED:
                    mean = mean * tl.load(scales + kv_heads + row % kv_heads)
                where_output = output + row.to(tl.int64) * (GROUP * DIM)
                if SOFT:
                    mixed = mix(log, mean, gate, 1, TILES, GROUP_TILE, DIM)
                    at_group = tl.arange(0, GROUP_TILE)[:, None]
                    tl.store(
                        where_output + at_group * DIM + at_dim[None, :],
                        mixed.to(dtype),
                        mask=at_group < GROUP,
                    )
                else:
                    tl.store(where_output + tile, mean.to(dtype), mask=inside)
            else:
                where_log = (2 * program + began) * BRANCHES * GROUP_TILE + at_query
                tl.store(part_logs + where_log, log, mask=real)
                tl.store(part_values + where_log[:, None] * DIM + at_dim[None, :], mean, mask=inside)
            high = tl.full([QUERIES], float("-inf"), tl.float32)
            mass = tl.zeros([QUERIES, BLOCK], tl.float32)
            sum_v = tl.zeros([QUERIES, DIM], tl.float32)

        began = tl.where(ends, 1, began)
        row = tl.where(ends, row + 1, row)
        count = tl.where(ends, next_count, count)
        if SOFT:
            gate = tl.where(ends, next_gate, gate)
        block = tl.where(ends, 0, block + 1)
        found = _cells(next_page, block, count, gate, sink, recent, PAGE, BLOCK, SOFT)
        # looked up two steps ahead, for the loads of one step ahead start in this one
        next_row, next_block, next_count, next_gate = _advance(
            next_row,
            next_block,
            next_count,
            next_gate,
            later_count,
            later_gate,
            rows,
            sink,
            recent,
            BLOCK,
            SOFT,
        )
        next_page = _pages(
            table, stride, next_row, next_block, next_count, next_gate, sink, recent, PAGE, BLOCK, SOFT
        )
        later_count, later_gate = _look_up(counts, gates, next_row, rows, SOFT)
    if first_parts + last_parts > 0:
        tl.debug_barrier()
        sides = tl.arange(0, 2)
        parts = tl.where(sides == 0, first_parts, last_parts)
        place = arrivals + tl.where(sides == 0, first_row, row)
        last = (tl.atomic_add(place, 1, mask=parts > 0, sem="acq_rel") == parts - 1) & (parts > 0)
        tl.store(place, 0, mask=last)
        first_parts = tl.sum(tl.where(last & (sides == 0), parts, 0), 0)
        last_parts = tl.sum(tl.where(last & (sides == 1), parts, 0), 0)
        if first_parts + last_parts > 0:
            merge(
                output, gates, scales, part_values, part_logs,
                first_row, first_part, first_parts, row, program, last_parts,
                kv_heads, GROUP, GROUP_TILE, DIM, SOFT, SCALED, PARTS,
            )  # fmt: skip
