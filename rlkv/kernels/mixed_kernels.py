"""The device code of ``mixed.py``. Rows of a tile are (position, query head of the KV head) pairs, SEATS rows
a position: the KV head's GROUP of query heads, and idle ones up to a power of two.

A tile table is int32 [tiles, FIELDS]: doc, first and past-the-last row of the doc in the packed row, where
the tile starts (position in the doc), first and past-the-last query position that a key tile meets, whether
it's a sink tile, and what to add to a position to find its row in the far pass's tensors: the queries',
their log-sums, the keys'.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIELDS = 10


@triton.jit
def _steps(start, stop, sink, recent, BLOCK: tl.constexpr):
    """For queries [start, stop): steps over the sink's keys, the first other key, steps altogether."""
    sink_steps = (tl.minimum(sink, stop) + BLOCK - 1) // BLOCK
    lowest = tl.maximum(sink, start - recent + 1)
    return sink_steps, lowest, sink_steps + (tl.maximum(stop - lowest, 0) + BLOCK - 1) // BLOCK


@triton.jit
def _window_block(
    keys, values, key_stride, value_stride, position, step, sink_steps, lowest, stop, sink, recent,
    BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Keys, values [BLOCK, DIM] of one step, and which query sees which key."""
    is_sink = step < sink_steps
    first = tl.where(is_sink, step * BLOCK, lowest + (step - sink_steps) * BLOCK)
    limit = tl.where(is_sink, tl.minimum(sink, stop), stop)
    reach = tl.where(is_sink, stop, recent)
    key = first + tl.arange(0, BLOCK)
    valid = key < limit
    at_dim = tl.arange(0, DIM)
    k = tl.load(keys + key[:, None] * key_stride + at_dim[None, :], mask=valid[:, None], other=0.0)
    v = tl.load(values + key[:, None] * value_stride + at_dim[None, :], mask=valid[:, None], other=0.0)
    distance = position[:, None] - key[None, :]
    return k, v, valid[None, :] & (distance >= 0) & (distance < reach)


@triton.jit(
    do_not_specialize=["sink", "recent", "gate_doc", "rest_log_doc", "rest_log_t", "rest_log_h"],
    do_not_specialize_on_alignment=["gates"],
)
def forward_kernel(
    query, key, value, gates, tiles, rest_heads,
    rest_output, rest_log,  # of the far keys; rest_log becomes the log-sum over all keys
    output, full, difference, local_log, share,  # the last four only if SAVE
    sink, recent, scale,
    query_t, query_h, key_t, key_h, value_t, value_h, gate_doc,
    rest_t, rest_h, rest_log_doc, rest_log_t, rest_log_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SEATS: tl.constexpr, POSITIONS: tl.constexpr,
    BLOCK: tl.constexpr, DIM: tl.constexpr, FIELDS: tl.constexpr, SAVE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Local attention of one tile, merged with the far keys' into full attention, mixed by the gate."""
    ROWS: tl.constexpr = POSITIONS * SEATS
    LOG2_E: tl.constexpr = 1.4426950408889634
    tile = tiles + tl.program_id(0) * FIELDS
    head = tl.program_id(1)
    doc, begin, end, start = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    row = tl.arange(0, ROWS)
    position = start + row // SEATS
    query_head = head * GROUP + row % SEATS
    there = (position < end - begin) & (row % SEATS < GROUP)
    at_dim = tl.arange(0, DIM)
    inside = there[:, None] & (at_dim[None, :] < DIM)
    token = (begin + position).to(tl.int64)
    where_q = token * query_t + query_head * query_h
    q = tl.load(query + where_q[:, None] + at_dim[None, :], mask=inside, other=0.0)
    keys = key + begin.to(tl.int64) * key_t + head * key_h
    values = value + begin.to(tl.int64) * value_t + head * value_h
    high = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    sum_v = tl.zeros([ROWS, DIM], tl.float32)
    stop = tl.minimum(start + POSITIONS, end - begin)
    sink_steps, lowest, steps = _steps(start, stop, sink, recent, BLOCK)
    for step in range(0, steps):
        k, v, seen = _window_block(keys, values, key_t, value_t, position, step, sink_steps, lowest, stop,
            sink, recent, BLOCK, DIM)  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision=WIDE) * (scale * LOG2_E)
        scores = tl.where(seen, scores, float("-inf"))
        above = tl.maximum(high, tl.max(scores, 1))
        shift = tl.where(above == float("-inf"), 0.0, above)  # a row may see nothing of its first blocks
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(high - shift)
        mass = mass * shrink + tl.sum(weights, 1)
        sum_v = tl.dot(weights.to(v.dtype), v, sum_v * shrink[:, None], input_precision=WIDE)
        high = above
    mass = tl.where(mass > 0, mass, 1.0)
    near_log = high + tl.log2(mass)
    near_mean = sum_v / mass[:, None]

    rest_head = tl.load(rest_heads + head)
    gate = tl.load(gates + doc * gate_doc + head)
    far = there & (position >= tl.where(rest_head >= 0, sink + recent, end - begin))
    far_head = rest_head * GROUP + row % SEATS
    where_log = (tl.load(tile + 8) + position).to(tl.int64) * rest_log_t + far_head * rest_log_h
    where_log += doc.to(tl.int64) * rest_log_doc
    far_log = tl.load(rest_log + where_log, mask=far, other=float("-inf")) * LOG2_E
    top = tl.maximum(near_log, far_log)
    near_mass = tl.exp2(near_log - top)
    far_mass = tl.exp2(far_log - top)
    portion = near_mass / (near_mass + far_mass)
    where_rest = (tl.load(tile + 7) + position).to(tl.int64) * rest_t + far_head * rest_h
    far_inside = far[:, None] & (at_dim[None, :] < DIM)
    far_mean = tl.load(rest_output + where_rest[:, None] + at_dim[None, :], mask=far_inside, other=0.0)
    apart = (far_mean.to(tl.float32) - near_mean) * (1.0 - portion)[:, None]  # full - local
    everything = near_mean + apart
    mixed = near_mean + apart * gate
    dtype = output.dtype.element_ty
    where = (token * HEADS * GROUP + query_head)[:, None] * DIM + at_dim[None, :]
    tl.store(output + where, mixed.to(dtype), mask=inside)
    if SAVE:
        tl.store(full + where, everything.to(dtype), mask=inside)
        tl.store(difference + where, apart.to(dtype), mask=inside)
        where_row = token * HEADS * GROUP + query_head
        tl.store(local_log + where_row, near_log, mask=there)
        tl.store(share + where_row, portion, mask=there)
        tl.store(rest_log + where_log, (top + tl.log2(near_mass + far_mass)) / LOG2_E, mask=far)


@triton.jit(do_not_specialize=["sink", "recent", "gate_doc"], do_not_specialize_on_alignment=["gates"])
def query_gradient_kernel(
    query, key, value, gates, tiles, rest_heads,
    gradient, full, difference, local_log, share,
    rest_gradient,  # of the queries, from the far keys, not yet times the gate
    grad_query, log, delta,  # the last two are for the keys' kernel
    gate_slope,  # float32 [tiles, HEADS]
    sink, recent, scale,
    query_t, query_h, key_t, key_h, value_t, value_h, grad_t, grad_h, gate_doc, rest_t, rest_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SEATS: tl.constexpr, POSITIONS: tl.constexpr,
    BLOCK: tl.constexpr, DIM: tl.constexpr, FIELDS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile's queries; both branches at once, as one softmax of scaled mass.

    With p the local and c p the full probability of a local key, the gradient of its score is
    a c p (x - d_full) + (1 - a) p (x - d_local) = w p (x - d), w = a c + 1 - a, d the two d's mean.
    """
    ROWS: tl.constexpr = POSITIONS * SEATS
    LOG2_E: tl.constexpr = 1.4426950408889634
    tile = tiles + tl.program_id(0) * FIELDS
    head = tl.program_id(1)
    doc, begin, end, start = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    row = tl.arange(0, ROWS)
    position = start + row // SEATS
    query_head = head * GROUP + row % SEATS
    there = (position < end - begin) & (row % SEATS < GROUP)
    at_dim = tl.arange(0, DIM)
    inside = there[:, None] & (at_dim[None, :] < DIM)
    token = (begin + position).to(tl.int64)
    where_q = token * query_t + query_head * query_h
    q = tl.load(query + where_q[:, None] + at_dim[None, :], mask=inside, other=0.0)
    where_grad = token * grad_t + query_head * grad_h
    grad = tl.load(gradient + where_grad[:, None] + at_dim[None, :], mask=inside, other=0.0)
    where_row = token * HEADS * GROUP + query_head
    where = where_row[:, None] * DIM + at_dim[None, :]
    wide_grad = grad.to(tl.float32)
    full_delta = tl.sum(wide_grad * tl.load(full + where, mask=inside, other=0.0).to(tl.float32), 1)
    apart = tl.sum(wide_grad * tl.load(difference + where, mask=inside, other=0.0).to(tl.float32), 1)
    tl.store(gate_slope + tl.program_id(0) * HEADS + head, tl.sum(apart, 0))
    gate = tl.load(gates + doc * gate_doc + head)
    open_share = gate * tl.load(share + where_row, mask=there, other=1.0)
    weight = open_share + 1.0 - gate
    some = weight > 0
    row_log = tl.load(local_log + where_row, mask=there, other=0.0)
    row_log = tl.where(some, row_log - tl.log2(tl.where(some, weight, 1.0)), 1e30)
    mean = tl.where(some, open_share / tl.where(some, weight, 1.0), 1.0)
    row_delta = full_delta - apart * (1.0 - mean)
    tl.store(log + where_row, row_log, mask=there)
    tl.store(delta + where_row, row_delta, mask=there)

    keys = key + begin.to(tl.int64) * key_t + head * key_h
    values = value + begin.to(tl.int64) * value_t + head * value_h
    grad_q = tl.zeros([ROWS, DIM], tl.float32)
    stop = tl.minimum(start + POSITIONS, end - begin)
    sink_steps, lowest, steps = _steps(start, stop, sink, recent, BLOCK)
    for step in range(0, steps):
        k, v, seen = _window_block(keys, values, key_t, value_t, position, step, sink_steps, lowest, stop,
            sink, recent, BLOCK, DIM)  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision=WIDE) * (scale * LOG2_E)
        weights = tl.where(seen, tl.exp2(scores - row_log[:, None]), 0.0)
        slope = tl.dot(grad, tl.trans(v), input_precision=WIDE) - row_delta[:, None]
        grad_q = tl.dot((weights * slope).to(k.dtype), k, grad_q, input_precision=WIDE)
    rest_head = tl.load(rest_heads + head)
    far = there & (position >= tl.where(rest_head >= 0, sink + recent, end - begin))
    far_inside = far[:, None] & (at_dim[None, :] < DIM)
    where_rest = (tl.load(tile + 7) + position).to(tl.int64) * rest_t + (
        rest_head * GROUP + row % SEATS
    ) * rest_h
    far_grad = tl.load(rest_gradient + where_rest[:, None] + at_dim[None, :], mask=far_inside, other=0.0)
    grad_q = grad_q * scale + far_grad.to(tl.float32) * gate
    tl.store(grad_query + where, grad_q.to(grad_query.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["sink", "recent", "gate_doc"], do_not_specialize_on_alignment=["gates"])
def key_gradient_kernel(
    query, key, value, gates, tiles, rest_heads,
    gradient, log, delta,
    rest_key, rest_value,  # gradients from the far queries, not yet times the gate
    grad_key, grad_value,
    sink_key, sink_value,  # float32 [docs, sink, HEADS, DIM], zeros before
    sink, recent, scale,
    query_t, query_h, key_t, key_h, value_t, value_h, grad_t, grad_h, gate_doc, rest_t, rest_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SEATS: tl.constexpr, POSITIONS: tl.constexpr,
    BLOCK: tl.constexpr, DIM: tl.constexpr, FIELDS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile's keys and values from the queries that see them through the window.

    Every query sees the sink, so a sink tile takes a stretch of the queries and adds to a float32 buffer.
    """
    ROWS: tl.constexpr = POSITIONS * SEATS
    LOG2_E: tl.constexpr = 1.4426950408889634
    tile = tiles + tl.program_id(0) * FIELDS
    head = tl.program_id(1)
    doc, begin, end, start = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    is_sink = tl.load(tile + 6) != 0
    length = end - begin
    at_key = start + tl.arange(0, BLOCK)
    valid = at_key < tl.where(is_sink, tl.minimum(sink, length), length)
    at_dim = tl.arange(0, DIM)
    inside = valid[:, None] & (at_dim[None, :] < DIM)
    token = (begin + at_key).to(tl.int64)
    k = tl.load(key + (token * key_t + head * key_h)[:, None] + at_dim[None, :], mask=inside, other=0.0)
    v = tl.load(value + (token * value_t + head * value_h)[:, None] + at_dim[None, :], mask=inside, other=0.0)
    grad_k = tl.zeros([BLOCK, DIM], tl.float32)
    grad_v = tl.zeros([BLOCK, DIM], tl.float32)
    reach = tl.where(is_sink, length, recent)
    row = tl.arange(0, ROWS)
    query_stop = tl.load(tile + 5)
    for query_start in range(tl.load(tile + 4), query_stop, POSITIONS):
        position = query_start + row // SEATS
        query_head = head * GROUP + row % SEATS
        there = (position < query_stop) & (row % SEATS < GROUP)
        row_inside = there[:, None] & (at_dim[None, :] < DIM)
        query_token = (begin + position).to(tl.int64)
        where_q = query_token * query_t + query_head * query_h
        q = tl.load(query + where_q[:, None] + at_dim[None, :], mask=row_inside, other=0.0)
        where_grad = query_token * grad_t + query_head * grad_h
        grad = tl.load(gradient + where_grad[:, None] + at_dim[None, :], mask=row_inside, other=0.0)
        where_row = query_token * HEADS * GROUP + query_head
        row_log = tl.load(log + where_row, mask=there, other=1e30)
        row_delta = tl.load(delta + where_row, mask=there, other=0.0)
        distance = position[None, :] - at_key[:, None]
        seen = (distance >= 0) & (distance < reach) & valid[:, None]
        scores = tl.dot(k, tl.trans(q), input_precision=WIDE) * (scale * LOG2_E)
        weights = tl.where(seen, tl.exp2(scores - row_log[None, :]), 0.0)
        grad_v = tl.dot(weights.to(grad.dtype), grad, grad_v, input_precision=WIDE)
        slope = tl.dot(v, tl.trans(grad), input_precision=WIDE) - row_delta[None, :]
        grad_k = tl.dot((weights * slope).to(q.dtype), q, grad_k, input_precision=WIDE)
    grad_k = grad_k * scale
    if is_sink:
        cell = ((doc * sink + at_key) * HEADS + head)[:, None] * DIM + at_dim[None, :]
        tl.atomic_add(sink_key + cell, grad_k, mask=inside, sem="relaxed")
        tl.atomic_add(sink_value + cell, grad_v, mask=inside, sem="relaxed")
    else:
        gate = tl.load(gates + doc * gate_doc + head)
        rest_head = tl.load(rest_heads + head)
        far = valid & (at_key < tl.where(rest_head >= 0, length - recent, 0))
        far_inside = far[:, None] & (at_dim[None, :] < DIM)
        where_rest = (tl.load(tile + 9) + at_key).to(tl.int64) * rest_t + rest_head * rest_h
        far_k = tl.load(rest_key + where_rest[:, None] + at_dim[None, :], mask=far_inside, other=0.0)
        far_v = tl.load(rest_value + where_rest[:, None] + at_dim[None, :], mask=far_inside, other=0.0)
        where = (token * HEADS + head)[:, None] * DIM + at_dim[None, :]
        dtype = grad_key.dtype.element_ty
        tl.store(grad_key + where, (grad_k + far_k.to(tl.float32) * gate).to(dtype), mask=inside)
        tl.store(grad_value + where, (grad_v + far_v.to(tl.float32) * gate).to(dtype), mask=inside)
