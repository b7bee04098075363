"""Kernels for queries that read a range of chosen keys in every band: windows, strided keys, blocks, offset grids.

A band is a branch (segments of ``LENGTHS[i]`` tokens, 0 without end; of every ``RATES[i]`` blocks of ``BLOCKS[i]`` tokens a
head chooses one) or the window (all keys at distances below ``WINDOWS[i]``). A head's chosen keys are numbered along the
whole grid; a query reads those from ``low`` to ``high``, and both rise with the query. Position ``p`` counts as ``p + origin``
on a band's grid. Queries are all positions, or the rows of band ``C.ROWS_OF``. Constants ``C``: ``bands.BandSettings``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from longnet.attention.backends.triton.kernels.rows import (
    LOG2E,
    accumulator,
    head_rows,
    load_tile,
    mixed,
    padding_alone,
    padding_of,
    tokens_before,
)

LN2 = tl.constexpr(0.6931471805599453)


class Place(NamedTuple):
    """Which rows a program owns: of this batch row, query head and key head, from number ``first`` on."""

    batch: Any
    head: Any
    kv_head: Any
    first: Any


@triton.jit
def offset_in(head, i: tl.constexpr, sizes, C: tl.constexpr):
    """The head's offset in a band, in blocks."""
    if C.HEAD_OFFSETS == 1:
        return head // tl.cdiv(sizes.heads, C.RATES[i])
    elif C.HEAD_OFFSETS == 2:
        return head // C.GROUP % C.RATES[i]
    else:
        return head % C.RATES[i]


@triton.jit
def origin_of(OFFSETS, batch, i: tl.constexpr, sizes, C: tl.constexpr):
    """Where token 0 stands on a band's grid, at least 0."""
    PERIOD: tl.constexpr = C.LENGTHS[i] if C.LENGTHS[i] > 0 else C.RATES[i] * C.BLOCKS[i]
    return tokens_before(OFFSETS, sizes.segment_offset, batch, PERIOD, C.BY_ROW)


@triton.jit
def chosen_before(local, offset, i: tl.constexpr, C: tl.constexpr):
    """How many keys of a segment stand before a place in it."""
    if C.BLOCKS[i] == 1:
        return (local - offset + C.RATES[i] - 1) // C.RATES[i]
    else:
        cycle = local // (C.RATES[i] * C.BLOCKS[i])
        rest = local - cycle * (C.RATES[i] * C.BLOCKS[i]) - offset * C.BLOCKS[i]
        return cycle * C.BLOCKS[i] + tl.minimum(tl.maximum(rest, 0), C.BLOCKS[i])


@triton.jit
def number_at(position, origin, offset, i: tl.constexpr, C: tl.constexpr):
    """How many keys of the grid stand before a position."""
    on_grid = position + origin
    if C.LENGTHS[i] == 0:
        return chosen_before(on_grid, offset, i, C)
    else:
        segment = on_grid // C.LENGTHS[i]
        in_segment = chosen_before(on_grid - segment * C.LENGTHS[i], offset, i, C)
        return segment * chosen_before(C.LENGTHS[i], offset, i, C) + in_segment


@triton.jit
def position_of(number, origin, offset, i: tl.constexpr, C: tl.constexpr):
    """The position of a key by its number on the grid."""
    start = 0 - origin
    if C.LENGTHS[i] > 0:
        each = tl.maximum(chosen_before(C.LENGTHS[i], offset, i, C), 1)
        segment = number // each
        number -= segment * each
        start += segment * C.LENGTHS[i]
    if C.BLOCKS[i] == 1:
        return start + number * C.RATES[i] + offset
    else:
        cycle = number // C.BLOCKS[i]
        return start + (cycle * C.RATES[i] + offset) * C.BLOCKS[i] + number - cycle * C.BLOCKS[i]


@triton.jit
def first_key(query, origin, i: tl.constexpr, C: tl.constexpr):
    """The first position that a query may read in a band."""
    first = query * 0
    if C.LENGTHS[i] > 0:
        first = query - (query + origin) % C.LENGTHS[i]
    if C.WINDOWS[i] > 0:
        first = tl.maximum(first, query - C.WINDOWS[i] + 1)
    return tl.maximum(first, 0)


@triton.jit
def end_of_keys(query, origin, sizes, i: tl.constexpr, C: tl.constexpr):
    """The position after the last that a query may read in a band."""
    if C.CAUSAL:
        return query + 1
    else:
        end = query * 0 + sizes.length
        if C.LENGTHS[i] > 0:
            end = tl.minimum(end, query - (query + origin) % C.LENGTHS[i] + C.LENGTHS[i])
        if C.WINDOWS[i] > 0:
            end = tl.minimum(end, query + C.WINDOWS[i])
        return end


@triton.jit
def first_query(key, origin, i: tl.constexpr, C: tl.constexpr):
    """The first position that may read a key."""
    if C.CAUSAL:
        return key
    else:
        return first_key(key, origin, i, C)


@triton.jit
def end_of_queries(key, origin, sizes, i: tl.constexpr, C: tl.constexpr):
    """The position after the last that may read a key."""
    end = key * 0 + sizes.length
    if C.LENGTHS[i] > 0:
        end = tl.minimum(end, key - (key + origin) % C.LENGTHS[i] + C.LENGTHS[i])
    if C.WINDOWS[i] > 0:
        end = tl.minimum(end, key + C.WINDOWS[i])
    return end


@triton.jit
def place_of(sizes, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """What this program owns. Programs of one head are neighbours."""
    tile = tl.program_id(0) % sizes.tiles
    if LAST_FIRST:
        # The longest first, so that short programs fill the last wave.
        tile = sizes.tiles - 1 - tile
    pair = tl.program_id(0) // sizes.tiles
    batch, head = pair // sizes.heads, pair % sizes.heads
    return Place(tl.cast(batch, tl.int64), head, head // sizes.group, tile * BLOCK)


@triton.jit
def own_positions(place, OFFSETS, sizes, BLOCK: tl.constexpr, i: tl.constexpr, C: tl.constexpr):
    """(positions of a program's ``BLOCK`` rows, which are there, the first and the last that are, how many from there on).

    Args:
        i: the band whose rows they are; below 0 for all positions.
    """
    n = tl.arange(0, BLOCK)
    if i < 0:
        position = place.first + n
        last = tl.minimum(place.first + BLOCK - 1, sizes.length - 1)
        return position, position < sizes.length, place.first, last, sizes.length - place.first
    else:
        origin, offset = origin_of(OFFSETS, place.batch, i, sizes, C), offset_in(place.head, i, sizes, C)
        begin = number_at(0, origin, offset, i, C) + place.first
        count = number_at(sizes.length, origin, offset, i, C) - begin
        position = position_of(begin + n, origin, offset, i, C)
        last = position_of(begin + tl.minimum(BLOCK - 1, count - 1), origin, offset, i, C)
        return position, n < count, position_of(begin, origin, offset, i, C), last, count


@triton.jit
def whole_blocks(low, clear, cut, high, BLOCK: tl.constexpr):
    """(where blocks from ``low`` on begin to lie behind ``clear``, and where they no longer end before ``cut``)."""
    begin = low + tl.cdiv(tl.maximum(clear - low, 0), BLOCK) * BLOCK
    end = begin + tl.maximum(cut - begin, 0) // BLOCK * BLOCK
    begin = tl.minimum(begin, high)
    return begin, tl.maximum(tl.minimum(end, high), begin)


@triton.jit
def phase_of(phase: tl.constexpr, begin, whole, rest, end):
    """(where the blocks of one of three phases begin and end): cut, whole, cut."""
    if phase == 0:
        return begin, whole
    elif phase == 1:
        return whole, rest
    else:
        return rest, end


@triton.jit
def band_of(first, last, row, place, OFFSETS, sizes, i: tl.constexpr, C: tl.constexpr):
    """What queries read in a band: (origin, offset, low and high of each, of the first, and of the last)."""
    origin, offset = origin_of(OFFSETS, place.batch, i, sizes, C), offset_in(place.head, i, sizes, C)
    at = tl.minimum(row, last)
    low = number_at(first_key(at, origin, i, C), origin, offset, i, C)
    high = number_at(end_of_keys(at, origin, sizes, i, C), origin, offset, i, C)
    low_first = number_at(first_key(first, origin, i, C), origin, offset, i, C)
    high_first = number_at(end_of_keys(first, origin, sizes, i, C), origin, offset, i, C)
    low_last = number_at(first_key(last, origin, i, C), origin, offset, i, C)
    high_last = number_at(end_of_keys(last, origin, sizes, i, C), origin, offset, i, C)
    return origin, offset, low, high, low_first, high_first, low_last, high_last


@triton.jit
def _attend(
    q, k_rows, v_rows, k_step, v_step, j, stop, low, high, origin, offset, row_max, row_sum, acc, scale2, d_ok,
    extras, i: tl.constexpr, CUT: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """(row max, row sum, acc) after one more block of keys, from number ``j`` on; ``CUT``: some row may not see all of it."""
    number = j + tl.arange(0, C.N)
    key = position_of(number, origin, offset, i, C)
    inside = number < stop
    wide = key.to(tl.int64)[:, None]
    k = load_tile(k_rows + wide * k_step, inside, d_ok, CUT, C)
    s = tl.dot(q, tl.trans(k), input_precision=C.PRECISION) * scale2
    if C.PADDED:
        gone = padding_of(extras, key, inside, CUT) != 0
    if CUT:
        seen = (number[None, :] >= low[:, None]) & (number[None, :] < high[:, None])
        if C.PADDED:
            seen = seen & (~gone)[None, :]
        s = tl.where(seen, s, float("-inf"))
    elif C.PADDED:
        s = tl.where(gone[None, :], float("-inf"), s)
    new = tl.maximum(row_max, tl.max(s, 1))
    # A row that has seen no key yet subtracts 0: exp2(-inf - -inf) would be NaN.
    base = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s - base[:, None])
    rescale = tl.exp2(row_max - base)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    acc = acc * rescale[:, None]
    v = load_tile(v_rows + wide * v_step, inside, d_ok, CUT, C)
    if C.PADDED:
        # Whatever a padded value holds (a NaN, say) must not reach 0 * value.
        v = tl.where(gone[:, None], 0.0, v)
    return new, row_sum, tl.dot(p.to(v.dtype), v, acc, input_precision=C.PRECISION)


@triton.jit
def band_forward_kernel(
    Q, K, V, OUT, LSE, PADDING, OFFSETS, q_at, k_at, v_at, out_at, lse_at, padding_at, sizes, C: tl.constexpr
):  # fmt: skip
    """``M`` query rows: out and lse over all bands, mixed into what earlier launches left if ``MERGE``."""
    M: tl.constexpr = C.M
    N: tl.constexpr = C.N
    BANDS: tl.constexpr = C.BANDS
    place = place_of(sizes, M, C.CAUSAL)
    row, row_ok, first, last, count = own_positions(place, OFFSETS, sizes, M, C.ROWS_OF, C)
    if count <= 0:
        return
    d = tl.arange(0, C.D_BLOCK)
    d_ok = d < C.D
    stored = row_ok[:, None] & d_ok[None, :]
    head, kv_head = tl.cast(place.head, tl.int64), tl.cast(place.kv_head, tl.int64)
    wide = row.to(tl.int64)
    q = tl.load(head_rows(Q, q_at, place.batch, head) + wide[:, None] * q_at[2] + d[None, :], mask=stored, other=0.0)
    k_rows = head_rows(K, k_at, place.batch, kv_head) + d[None, :]
    v_rows = head_rows(V, v_at, place.batch, kv_head) + d[None, :]
    extras = padding_alone(PADDING, padding_at, place.batch)
    scale2 = sizes.scale * LOG2E
    row_max = tl.full([M], float("-inf"), tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    acc = accumulator(M, C.D_BLOCK)

    for i in tl.static_range(BANDS):
        origin, offset, low, high, begin, high_first, low_last, end = band_of(
            first, last, row, place, OFFSETS, sizes, i, C
        )
        whole, rest = whole_blocks(begin, low_last, high_first, end, N)
        for phase in tl.static_range(3):
            # Blocks that every row sees whole lie between those that some row sees in part.
            start, stop = phase_of(phase, begin, whole, rest, end)
            for j in tl.range(start, stop, N, num_stages=C.STAGES):
                row_max, row_sum, acc = _attend(
                    q, k_rows, v_rows, k_at[2], v_at[2], j, end, low, high, origin, offset, row_max, row_sum, acc, scale2, d_ok,
                    extras, i, phase != 1, C,
                )  # fmt: skip

    # Not "greater": the sum of a query that is NaN is NaN, and so is its lse.
    some = row_sum != 0.0
    out = acc / tl.where(some, row_sum, 1.0)[:, None]
    lse = tl.where(some, row_max * LN2 + tl.log(tl.where(some, row_sum, 1.0)), float("-inf"))
    out_rows = head_rows(OUT, out_at, place.batch, head) + wide[:, None] * out_at[2] + d[None, :]
    lse_rows = head_rows(LSE, lse_at, place.batch, head) + wide * lse_at[2]
    if C.MERGE:
        out, lse = mixed(out, lse, out_rows, lse_rows, row_ok, stored)
    tl.store(out_rows, out.to(OUT.dtype.element_ty), mask=stored)
    tl.store(lse_rows, lse, mask=row_ok)


@triton.jit
def _query_step(
    q, grad, k_rows, v_rows, k_step, v_step, j, stop, low, high, origin, offset, grad_q, lse2, delta, scale2, row_ok, d_ok,
    extras, i: tl.constexpr, CUT: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries after one more block of keys, from number ``j`` on."""
    number = j + tl.arange(0, C.N)
    key = position_of(number, origin, offset, i, C)
    inside = number < stop
    wide = key.to(tl.int64)[:, None]
    k = load_tile(k_rows + wide * k_step, inside, d_ok, CUT, C)
    v = load_tile(v_rows + wide * v_step, inside, d_ok, CUT, C)
    if C.PADDED:
        held = padding_of(extras, key, inside, CUT) == 0
        k, v = tl.where(held[:, None], k, 0.0), tl.where(held[:, None], v, 0.0)
    s = tl.dot(q, tl.trans(k), input_precision=C.PRECISION) * scale2
    seen = row_ok[:, None]
    if CUT:
        seen = seen & (number[None, :] >= low[:, None]) & (number[None, :] < high[:, None])
    p = tl.exp2(s - lse2[:, None])
    if C.PADDED:
        p = tl.where(held[None, :], p, 0.0)
    if CUT:
        p = tl.where(seen, p, 0.0)
    grad_p = tl.dot(grad, tl.trans(v), input_precision=C.PRECISION)
    grad_s = p * (grad_p - delta[:, None])
    return tl.dot(grad_s.to(k.dtype), k, grad_q, input_precision=C.PRECISION)


@triton.jit
def band_query_kernel(
    Q, K, V, GRAD_OUT, LSE, DELTA, PADDING, OFFSETS, GRAD_Q,
    q_at, k_at, v_at, grad_at, lse_at, padding_at, grad_q_at, sizes, C: tl.constexpr,
):  # fmt: skip
    """Gradients of ``M`` query rows over all bands, added to what earlier launches left if ``MERGE``."""
    M: tl.constexpr = C.M
    N: tl.constexpr = C.N
    BANDS: tl.constexpr = C.BANDS
    place = place_of(sizes, M, C.CAUSAL)
    row, row_ok, first, last, count = own_positions(place, OFFSETS, sizes, M, C.ROWS_OF, C)
    if count <= 0:
        return
    d = tl.arange(0, C.D_BLOCK)
    d_ok = d < C.D
    stored = row_ok[:, None] & d_ok[None, :]
    head, kv_head = tl.cast(place.head, tl.int64), tl.cast(place.kv_head, tl.int64)
    wide = row.to(tl.int64)
    q = tl.load(head_rows(Q, q_at, place.batch, head) + wide[:, None] * q_at[2] + d[None, :], mask=stored, other=0.0)
    grad_rows = head_rows(GRAD_OUT, grad_at, place.batch, head) + wide[:, None] * grad_at[2] + d[None, :]
    grad = tl.load(grad_rows, mask=stored, other=0.0)
    lse = tl.load(head_rows(LSE, lse_at, place.batch, head) + wide * lse_at[2], mask=row_ok, other=float("-inf"))
    # A row without keys, or a dead one, has lse -inf and probabilities 0; a dead one's query may be anything.
    nothing = lse == float("-inf")
    lse2 = tl.where(nothing, float("inf"), lse) * LOG2E
    delta = tl.load(head_rows(DELTA, lse_at, place.batch, head) + wide * lse_at[2], mask=row_ok, other=0.0)
    k_rows = head_rows(K, k_at, place.batch, kv_head) + d[None, :]
    v_rows = head_rows(V, v_at, place.batch, kv_head) + d[None, :]
    extras = padding_alone(PADDING, padding_at, place.batch)
    scale2 = sizes.scale * LOG2E
    grad_q = accumulator(M, C.D_BLOCK)

    for i in tl.static_range(BANDS):
        origin, offset, low, high, begin, high_first, low_last, end = band_of(
            first, last, row, place, OFFSETS, sizes, i, C
        )
        whole, rest = whole_blocks(begin, low_last, high_first, end, N)
        for phase in tl.static_range(3):
            start, stop = phase_of(phase, begin, whole, rest, end)
            for j in tl.range(start, stop, N, num_stages=C.STAGES):
                grad_q = _query_step(
                    q, grad, k_rows, v_rows, k_at[2], v_at[2], j, end, low, high, origin, offset, grad_q, lse2, delta, scale2,
                    row_ok, d_ok, extras, i, phase != 1, C,
                )  # fmt: skip

    grad_q = tl.where(nothing[:, None], 0.0, grad_q * sizes.scale)
    at_rows = head_rows(GRAD_Q, grad_q_at, place.batch, head) + wide[:, None] * grad_q_at[2] + d[None, :]
    if C.MERGE:
        grad_q += tl.load(at_rows, mask=stored, other=0.0).to(tl.float32)
    tl.store(at_rows, grad_q.to(GRAD_Q.dtype.element_ty), mask=stored)


@triton.jit
def _key_step(
    k, v, q_rows, grad_rows, lse_rows, delta_rows, q_step, grad_step, lse_step, j, stop, first, end, q_origin, q_offset,
    grad_k, grad_v, scale2, held, d_ok, extras, CUT: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and values after one more block of queries, from number ``j`` on."""
    number = j + tl.arange(0, C.M)
    row = number
    if C.ROWS_OF >= 0:
        row = position_of(number, q_origin, q_offset, C.ROWS_OF, C)
    inside = number < stop
    wide = row.to(tl.int64)
    q = load_tile(q_rows + wide[:, None] * q_step, inside, d_ok, True, C)
    lse = tl.load(lse_rows + wide * lse_step, mask=inside, other=float("-inf"))
    shift = tl.where(lse == float("-inf"), float("-inf"), lse * -LOG2E)
    s = tl.dot(k, tl.trans(q), input_precision=C.PRECISION) * scale2
    seen = held[:, None] & inside[None, :]
    if CUT:
        seen = seen & (row[None, :] >= first[:, None]) & (row[None, :] < end[:, None])
    p = tl.exp2(s + shift[None, :])
    if CUT or C.PADDED:
        p = tl.where(seen, p, 0.0)
    grad = load_tile(grad_rows + wide[:, None] * grad_step, inside, d_ok, True, C)
    grad_v = tl.dot(p.to(grad.dtype), grad, grad_v, input_precision=C.PRECISION)
    delta = tl.load(delta_rows + wide * lse_step, mask=inside, other=0.0)
    grad_p = tl.dot(v, tl.trans(grad), input_precision=C.PRECISION)
    grad_s = p * (grad_p - delta[None, :])
    return tl.dot(grad_s.to(q.dtype), q, grad_k, input_precision=C.PRECISION), grad_v


@triton.jit
def band_key_value_kernel(
    Q, K, V, GRAD_OUT, LSE, DELTA, PADDING, OFFSETS, GRAD_K, GRAD_V,
    q_at, k_at, v_at, grad_at, lse_at, padding_at, grad_k_at, grad_v_at, sizes, C: tl.constexpr,
):  # fmt: skip
    """Gradients of ``N`` keys and values of band 0 by one query head, added to what earlier launches left if ``MERGE``."""
    M: tl.constexpr = C.M
    N: tl.constexpr = C.N
    place = place_of(sizes, N, False)
    key, key_ok, first_own, last_own, count = own_positions(place, OFFSETS, sizes, N, 0, C)
    if count <= 0:
        return
    d = tl.arange(0, C.D_BLOCK)
    d_ok = d < C.D
    stored = key_ok[:, None] & d_ok[None, :]
    head, kv_head = tl.cast(place.head, tl.int64), tl.cast(place.kv_head, tl.int64)
    wide = key.to(tl.int64)[:, None]
    extras = padding_alone(PADDING, padding_at, place.batch)
    held = key_ok
    if C.PADDED:
        held = key_ok & (padding_of(extras, key, key_ok, True) == 0)
    loaded = held[:, None] & d_ok[None, :]
    k = tl.load(head_rows(K, k_at, place.batch, kv_head) + wide * k_at[2] + d[None, :], mask=loaded, other=0.0)
    v = tl.load(head_rows(V, v_at, place.batch, kv_head) + wide * v_at[2] + d[None, :], mask=loaded, other=0.0)
    q_rows = head_rows(Q, q_at, place.batch, head) + d[None, :]
    grad_rows = head_rows(GRAD_OUT, grad_at, place.batch, head) + d[None, :]
    lse_rows = head_rows(LSE, lse_at, place.batch, head)
    delta_rows = head_rows(DELTA, lse_at, place.batch, head)
    scale2 = sizes.scale * LOG2E
    grad_k = accumulator(N, C.D_BLOCK)
    grad_v = accumulator(N, C.D_BLOCK)

    origin = origin_of(OFFSETS, place.batch, 0, sizes, C)
    at = tl.minimum(key, last_own)
    first, end = first_query(at, origin, 0, C), end_of_queries(at, origin, sizes, 0, C)
    # All queries read the keys from the last one's first query to the first one's last.
    begin, clear = first_query(first_own, origin, 0, C), first_query(last_own, origin, 0, C)
    cut, stop = end_of_queries(first_own, origin, sizes, 0, C), end_of_queries(last_own, origin, sizes, 0, C)
    q_origin, q_offset = 0, 0
    if C.ROWS_OF >= 0:
        q_origin, q_offset = origin, offset_in(place.head, C.ROWS_OF, sizes, C)
        begin = number_at(begin, q_origin, q_offset, C.ROWS_OF, C)
        clear = number_at(clear, q_origin, q_offset, C.ROWS_OF, C)
        cut = number_at(cut, q_origin, q_offset, C.ROWS_OF, C)
        stop = number_at(stop, q_origin, q_offset, C.ROWS_OF, C)
    whole, rest = whole_blocks(begin, clear, cut, stop, M)
    for phase in tl.static_range(3):
        low, high = phase_of(phase, begin, whole, rest, stop)
        for j in tl.range(low, high, M, num_stages=C.STAGES):
            grad_k, grad_v = _key_step(
                k, v, q_rows, grad_rows, lse_rows, delta_rows, q_at[2], grad_at[2], lse_at[2], j, stop, first, end, q_origin,
                q_offset, grad_k, grad_v, scale2, held, d_ok, extras, phase != 1, C,
            )  # fmt: skip

    grad_k *= sizes.scale
    k_out = head_rows(GRAD_K, grad_k_at, place.batch, head) + wide * grad_k_at[2] + d[None, :]
    v_out = head_rows(GRAD_V, grad_v_at, place.batch, head) + wide * grad_v_at[2] + d[None, :]
    if C.MERGE:
        grad_k += tl.load(k_out, mask=stored, other=0.0).to(tl.float32)
        grad_v += tl.load(v_out, mask=stored, other=0.0).to(tl.float32)
    tl.store(k_out, grad_k.to(GRAD_K.dtype.element_ty), mask=stored)
    tl.store(v_out, grad_v.to(GRAD_V.dtype.element_ty), mask=stored)
