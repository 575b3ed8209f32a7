"""The device code of ``decode.py``."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _add_keys(q, k, v, seen, high, mass, sum_v, scale, WIDE: tl.constexpr):
    """Online softmax, base 2, over one block: new (highest score, exp-sum, weighted values) of each query."""
    scores = tl.dot(q, tl.trans(k), input_precision=WIDE) * scale
    scores = tl.where(seen[None, :], scores, float("-inf"))
    above = tl.maximum(high, tl.max(scores, 1))
    shift = tl.where(above == float("-inf"), 0.0, above)  # nothing seen yet
    weights = tl.exp2(scores - shift[:, None])
    shrink = tl.exp2(high - shift)
    mass = mass * shrink + tl.sum(weights, 1)
    sum_v = tl.dot(weights.to(v.dtype), v, sum_v * shrink[:, None], input_precision=WIDE)
    return above, mass, sum_v


@triton.jit
def _find(pages, block, count, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Where a row's block begins in memory, in tokens, or where each of its tokens is if pages are smaller.

    It is asked for one step ahead, so that the keys' loads needn't wait for the table's.
    """
    if PAGE >= BLOCK:
        first = block * BLOCK
        page = tl.load(pages + first // PAGE, mask=first < count, other=0)
        return page.to(tl.int64) * PAGE + first % PAGE
    else:
        position = block * BLOCK + tl.arange(0, BLOCK)
        page = tl.load(pages + position // PAGE, mask=position < count, other=0)
        return page.to(tl.int64) * PAGE + position % PAGE


@triton.jit
def _locate(row, kv_heads, query_stride, table_stride_n, table_stride_h, WIDTH: tl.constexpr):
    """Where a row's pages are in the table, and its queries, WIDTH numbers, in the query."""
    request = (row // kv_heads).to(tl.int64)
    head = row % kv_heads
    return request * table_stride_n + head * table_stride_h, request * query_stride + head * WIDTH


@triton.jit
def _load_block(
    keys, values, found, block, count, PAGE: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr
):
    """Keys, values [BLOCK, DIM], positions and validity of one block of a row; nothing else is read."""
    at = tl.arange(0, BLOCK)
    position = block * BLOCK + at
    valid = position < count
    cell = found
    if PAGE >= BLOCK:
        cell = found + at
    where = cell[:, None] * DIM + tl.arange(0, DIM)[None, :]
    k = tl.load(keys + where, mask=valid[:, None], other=0.0)
    v = tl.load(values + where, mask=valid[:, None], other=0.0)
    return k, v, position, valid


@triton.jit
def _normal(high, mass, sum_v):
    """(log2 of the exp-sum, mean value) of each query; (-inf, 0) where nothing was seen."""
    some = mass > 0
    log_mass = tl.where(some, high + tl.log2(tl.where(some, mass, 1.0)), float("-inf"))
    return log_mass, sum_v / tl.where(some, mass, 1.0)[:, None]


@triton.jit
def _mix(near_log, far_log, gate):
    """Weights of the window's and the other keys' means in gate * full + (1 - gate) * local."""
    top = tl.maximum(tl.maximum(near_log, far_log), -1e30)
    near = tl.exp2(near_log - top)
    far = tl.exp2(far_log - top)
    both = tl.maximum(near + far, 1e-30)
    return 1.0 - gate + gate * near / both, gate * far / both


@triton.jit(
    do_not_specialize=[
        "sink",
        "recent",
        "rows",
        "kv_heads",
        "table_stride_n",
        "table_stride_h",
        "gate_stride_n",
    ],
    do_not_specialize_on_alignment=[
        "table",
        "counts",
        "gates",
        "scales",
        "shares",
        "totals",
        "arrivals",
    ],
)  # one compilation for all batch sizes and layers
def decode_kernel(
    query,  # [n, kv_heads * GROUP, DIM]
    keys,  # [pages, PAGE, DIM]
    values,
    table,  # int32 [n, kv_heads, most pages of a row]
    output,  # like query
    counts,  # int32 [rows], row = request * kv_heads + head
    gates,  # float32 [n, kv_heads], SOFT only
    scales,  # float32 [2, kv_heads] of stored keys and values, SCALED only
    shares,  # int32 [programs, SHARE]: first row, first block of it, blocks, blocks before, the row's count
    totals,  # int32 [2]: blocks of all rows, programs that get some
    part_values,  # float32 [2 * programs, BRANCHES, GROUP_TILE, DIM]
    part_logs,  # float32 [2 * programs, BRANCHES, GROUP_TILE]
    arrivals,  # int32 [rows], zeros before and after
    scale,
    sink,
    recent,
    rows,
    kv_heads,
    query_stride,
    output_stride,
    table_stride_n,
    table_stride_h,
    gate_stride_n,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    SOFT: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    PARTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Every program takes an equal share of all rows' blocks; the last to finish a shared row merges it."""
    BRANCHES: tl.constexpr = 2 if SOFT else 1
    dtype: tl.constexpr = query.dtype.element_ty
    if EARLY:
        gdc_launch_dependents()
    program = tl.program_id(0)
    share = shares + program * 5
    row = tl.load(share)
    block_from = tl.load(share + 1)
    todo = tl.load(share + 2)
    before = tl.load(share + 3)
    count = tl.load(share + 4)
    total = tl.load(totals)
    sharers = tl.load(totals + 1)
    at_query = tl.arange(0, QUERIES)
    at_dim = tl.arange(0, DIM)
    real = at_query < GROUP
    inside = real[:, None] & (at_dim[None, :] < DIM)
    tile = at_query[:, None] * DIM + at_dim[None, :]
    pages, first = _locate(row, kv_heads, query_stride, table_stride_n, table_stride_h, GROUP * DIM)
    found = _find(table + pages, block_from, count, PAGE, BLOCK)
    if EARLY:  # so far nothing was read that the kernel before this one may have written
        gdc_wait()
    q = tl.load(query + first + tile, mask=inside, other=0.0)
    while todo > 0:
        request = row // kv_heads
        head = row % kv_heads
        blocks = tl.maximum((count + BLOCK - 1) // BLOCK, 1)
        if SOFT:  # blocks that touch the window come first, then those between its two parts
            gate = tl.load(gates + request.to(tl.int64) * gate_stride_n + head)
            sinks = tl.minimum((sink + BLOCK - 1) // BLOCK, blocks)
            recents = tl.maximum(sinks, tl.maximum(count - recent, 0) // BLOCK)
            touching = sinks + blocks - recents
            blocks = tl.where(gate == 0.0, touching, blocks)
        block_to = tl.minimum(block_from + todo, blocks)
        # the next row's first look-ups don't wait for this row's end
        next_row = tl.minimum(row + 1, rows - 1)
        next_pages, next_first = _locate(
            next_row, kv_heads, query_stride, table_stride_n, table_stride_h, GROUP * DIM
        )
        next_q = tl.load(query + next_first + tile, mask=inside, other=0.0)
        next_count = tl.load(counts + next_row)
        next_found = found
        if not SOFT:
            next_found = _find(table + next_pages, 0, 1 << 30, PAGE, BLOCK)
        row_scale = scale
        if SCALED:
            row_scale = scale * tl.load(scales + head)

        far_high = tl.full([QUERIES], float("-inf"), tl.float32)
        far_mass = tl.zeros([QUERIES], tl.float32)
        far_sum = tl.zeros([QUERIES, DIM], tl.float32)
        shift = 0
        middle = block_from
        if SOFT:
            near_high = tl.full([QUERIES], float("-inf"), tl.float32)
            near_mass = tl.zeros([QUERIES], tl.float32)
            near_sum = tl.zeros([QUERIES, DIM], tl.float32)
            block = tl.where(block_from < sinks, block_from, block_from - sinks + recents)
            found = _find(table + pages, block, count, PAGE, BLOCK)
            for step in range(block_from, tl.minimum(block_to, touching)):
                k, v, position, valid = _load_block(keys, values, found, block, count, PAGE, BLOCK, DIM)
                block = tl.where(step + 1 < sinks, step + 1, step + 1 - sinks + recents)
                found = _find(table + pages, block, count, PAGE, BLOCK)
                k, v = k.to(dtype), v.to(dtype)
                near = (position < sink) | (position >= count - recent)
                near_high, near_mass, near_sum = _add_keys(
                    q, k, v, valid & near, near_high, near_mass, near_sum, row_scale, WIDE
                )
                far_high, far_mass, far_sum = _add_keys(
                    q, k, v, valid & ~near, far_high, far_mass, far_sum, row_scale, WIDE
                )
            shift = sinks - touching
            middle = tl.maximum(block_from, touching)
            found = _find(table + pages, middle + shift, count, PAGE, BLOCK)
        for step in range(middle, block_to):
            k, v, position, valid = _load_block(keys, values, found, step + shift, count, PAGE, BLOCK, DIM)
            found = _find(table + pages, step + 1 + shift, count, PAGE, BLOCK)
            far_high, far_mass, far_sum = _add_keys(
                q, k.to(dtype), v.to(dtype), valid, far_high, far_mass, far_sum, row_scale, WIDE
            )
        far_log, far_mean = _normal(far_high, far_mass, far_sum)
        value_scale = 1.0
        if SCALED:
            value_scale = tl.load(scales + kv_heads + head)
        where_output = output + request.to(tl.int64) * output_stride + head * GROUP * DIM
        if SOFT:
            near_log, near_mean = _normal(near_high, near_mass, near_sum)
        if block_to - block_from == blocks:
            result = far_mean
            if SOFT:
                near_weight, far_weight = _mix(near_log, far_log, gate)
                result = near_mean * near_weight[:, None] + far_mean * far_weight[:, None]
            tl.store(where_output + tile, (result * value_scale).to(dtype), mask=inside)
        else:
            slot = 2 * program + (block_from == 0).to(tl.int32)
            where_log = slot * BRANCHES * GROUP_TILE + at_query
            where_value = where_log[:, None] * DIM + at_dim[None, :]
            tl.store(part_logs + where_log, far_log, mask=real)
            tl.store(part_values + where_value, far_mean, mask=inside)
            if SOFT:
                tl.store(part_logs + GROUP_TILE + where_log, near_log, mask=real)
                tl.store(part_values + GROUP_TILE * DIM + where_value, near_mean, mask=inside)
            tl.debug_barrier()
            first_part = ((before - block_from + 1) * sharers - 1) // total
            parts = ((before - block_from + blocks) * sharers - 1) // total - first_part + 1
            if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == parts - 1:
                tl.store(arrivals + row, 0)
                at_group = tl.arange(0, GROUP_TILE)
                all_far_log, merged = _merge(
                    part_logs, part_values, first_part, parts, BRANCHES, GROUP, GROUP_TILE, DIM, PARTS
                )
                if SOFT:
                    all_near_log, all_near = _merge(
                        part_logs + GROUP_TILE,
                        part_values + GROUP_TILE * DIM,
                        first_part,
                        parts,
                        BRANCHES,
                        GROUP,
                        GROUP_TILE,
                        DIM,
                        PARTS,
                    )
                    all_near_weight, all_far_weight = _mix(all_near_log, all_far_log, gate)
                    merged = all_near * all_near_weight[:, None] + merged * all_far_weight[:, None]
                where = at_group[:, None] * DIM + at_dim[None, :]
                tl.store(
                    where_output + where,
                    (merged * value_scale).to(dtype),
                    mask=(at_group < GROUP)[:, None] & (at_dim[None, :] < DIM),
                )
        todo -= block_to - block_from
        before += block_to - block_from
        block_from = 0
        row, count, q, found = next_row, next_count, next_q, next_found
        pages = next_pages


@triton.jit
def _merge(
    part_logs,
    part_values,
    first,
    parts,
    BRANCHES: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    DIM: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Log-sum-exp merge of one row's parts: (log2 of the exp-sum [GROUP_TILE], mean value [.., DIM])."""
    at_group = tl.arange(0, GROUP_TILE)
    at_part = tl.arange(0, PARTS)
    at_dim = tl.arange(0, DIM)
    high = tl.full([GROUP_TILE], -1e30, tl.float32)
    mass = tl.zeros([GROUP_TILE], tl.float32)
    mean = tl.zeros([GROUP_TILE, DIM], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + at_part
        slot = 2 * (first + part) + (part == 0).to(tl.int32)
        where = slot[:, None] * BRANCHES * GROUP_TILE + at_group[None, :]
        there = (part < parts)[:, None] & (at_group < GROUP)[None, :]
        logs = tl.load(part_logs + where, mask=there, other=float("-inf"), cache_modifier=".cg")
        inside = there[:, :, None] & (at_dim < DIM)[None, None, :]
        here = tl.load(
            part_values + where[:, :, None] * DIM + at_dim[None, None, :],
            mask=inside,
            other=0.0,
            cache_modifier=".cg",
        )
        above = tl.maximum(high, tl.max(logs, 0))
        weights = tl.exp2(logs - above[None, :])
        shrink = tl.exp2(high - above)
        mass = mass * shrink + tl.sum(weights, 0)
        mean = mean * shrink[:, None] + tl.sum(weights[:, :, None] * here, 0)
        high = above
    some = tl.maximum(mass, 1e-30)
    return tl.where(mass > 0, high + tl.log2(some), float("-inf")), mean / some[:, None]
