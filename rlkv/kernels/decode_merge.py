"""The end of a decoded row: its parts merged, its branches mixed."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix(
    logs, means, gate, ROWS: tl.constexpr, TILES: tl.constexpr, GROUP_TILE: tl.constexpr, DIM: tl.constexpr
):
    """gate * full + (1 - gate) * local: [ROWS * GROUP_TILE, DIM].

    Of means [ROWS * TILES * GROUP_TILE, DIM] and log2s of exp-sums, tile 0 the window's and 1 the others'.
    """
    logs = tl.reshape(logs, [ROWS, TILES, GROUP_TILE])
    tiles = tl.arange(0, TILES)[None, :, None]
    top = tl.maximum(tl.max(tl.where(tiles < 2, logs, float("-inf")), 1), -1e30)
    mass = tl.where(tiles < 2, tl.exp2(logs - top[:, None, :]), 0.0)
    share = gate * mass / tl.maximum(tl.sum(mass, 1), 1e-30)[:, None, :]
    share += tl.where(tiles == 0, 1.0 - gate, 0.0)
    means = tl.reshape(means, [ROWS, TILES, GROUP_TILE, DIM]) * share[:, :, :, None]
    return tl.reshape(tl.sum(means, 1), [ROWS * GROUP_TILE, DIM])


@triton.jit
def merge(
    output, gates, scales, part_values, part_logs,
    first_row, first_part, first_parts, last_row, last_part, last_parts,
    kv_heads, GROUP: tl.constexpr, GROUP_TILE: tl.constexpr, DIM: tl.constexpr,
    SOFT: tl.constexpr, SCALED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp merge of two rows' parts (0 parts: of none) into their outputs.

    Parts are taken one by one, each thread keeping its numbers: reductions across threads would take longer.
    """
    BRANCHES: tl.constexpr = 2 if SOFT else 1
    ALL: tl.constexpr = BRANCHES * GROUP_TILE
    at = tl.arange(0, 2 * ALL)
    at_dim = tl.arange(0, DIM)
    is_first = at < ALL
    part_from = tl.where(is_first, first_part, last_part)
    parts = tl.where(is_first & (at % GROUP_TILE < GROUP), first_parts, 0)
    parts = tl.where(~is_first & (at % GROUP_TILE < GROUP), last_parts, parts)
    high = tl.full([2 * ALL], -1e30, tl.float32)
    mass = tl.zeros([2 * ALL], tl.float32)
    mean = tl.zeros([2 * ALL, DIM], tl.float32)
    for start in range(0, tl.maximum(first_parts, last_parts), PARTS):
        for index in tl.static_range(0, PARTS):
            part = start + index
            slot = 2 * (part_from + part) + (part == 0).to(tl.int32)
            where = slot * ALL + at % ALL
            log = tl.load(part_logs + where, mask=part < parts, other=float("-inf"), cache_modifier=".cg")
            here = tl.load(
                part_values + where[:, None] * DIM + at_dim[None, :],
                mask=(part < parts)[:, None] & (at_dim < DIM)[None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            above = tl.maximum(high, log)
            weight = tl.exp2(log - above)
            shrink = tl.exp2(high - above)
            mass = mass * shrink + weight
            mean = mean * shrink[:, None] + weight[:, None] * here
            high = above
    some = tl.maximum(mass, 1e-30)
    mean = mean * (1.0 / some)[:, None]
    at_row = tl.arange(0, 2 * GROUP_TILE)
    row = tl.where(at_row < GROUP_TILE, first_row, last_row)
    merged = tl.where(at_row < GROUP_TILE, first_parts, last_parts) > 0
    merged &= at_row % GROUP_TILE < GROUP
    if SOFT:
        gate = tl.load(gates + tl.where((tl.arange(0, 2) == 0) | (last_parts == 0), first_row, last_row))
        log = tl.where(mass > 0, high + tl.log2(some), float("-inf"))
        mean = mix(log, mean, gate[:, None, None], 2, BRANCHES, GROUP_TILE, DIM)
    if SCALED:
        mean = mean * tl.load(scales + kv_heads + row % kv_heads)[:, None]
    where_output = row.to(tl.int64) * (GROUP * DIM) + at_row % GROUP_TILE * DIM
    tl.store(
        output + where_output[:, None] + at_dim[None, :],
        mean.to(output.dtype.element_ty),
        mask=merged[:, None] & (at_dim < DIM)[None, :],
    )
