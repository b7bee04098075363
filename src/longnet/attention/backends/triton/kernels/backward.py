"""The backward kernels: exact gradients of the joint softmax from the merged out and lse, without atomics.

Every program owns the rows whose gradient it sums: queries in one kernel, keys and values in another. That computes the
scores twice, and makes every run bit-identical.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longnet.attention.backends.triton.kernels.rows import (
    LOG2E,
    accumulator,
    bias_of,
    exponentials,
    extras_of,
    head_rows,
    heads_of,
    key_tiles,
    load_tile,
    locate,
    outer_range,
    own_range,
    own_rows,
    padding_of,
    range_weights,
    ranges_of,
)


@triton.jit
def prepare_kernel(
    Q, GRAD_OUT, OUT, LSE, GRAD_LSE, ROOM, ROW_LSE, DELTA,
    q_at, grad_at, out_at, grad_lse_at, room_at,
    length, heads,
    D: tl.constexpr, D_BLOCK: tl.constexpr, M: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """What the other kernels take of query rows, dead ones (see ``merge.rows_for_backward``) as rows without keys.

    ROOM: the queries, dead rows 0. ROW_LSE: lse, dead rows -inf. DELTA: sum(grad_out * out) - grad_lse, what is subtracted
    from every score gradient. LSE and the latter two are (B, H, N) contiguous float32.
    """
    blocks = tl.cdiv(length, M)
    pair = tl.cast(tl.program_id(0) // blocks, tl.int64)
    batch, head = pair // heads, pair % heads
    m = (tl.program_id(0) % blocks * M + tl.arange(0, M)).to(tl.int64)
    d = tl.arange(0, D_BLOCK)
    ok = (m < length)[:, None] & (d < D)[None, :]
    grad = tl.load(
        GRAD_OUT + batch * grad_at[0] + head * grad_at[1] + m[:, None] * grad_at[2] + d[None, :], mask=ok, other=0.0
    )
    out = tl.load(OUT + batch * out_at[0] + head * out_at[1] + m[:, None] * out_at[2] + d[None, :], mask=ok, other=0.0)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    alive = tl.max((grad.to(tl.float32) != 0.0).to(tl.int32), 1) != 0
    if HAS_LSE:
        grad_lse = tl.load(
            GRAD_LSE + batch * grad_lse_at[0] + head * grad_lse_at[1] + m * grad_lse_at[2], mask=m < length, other=0.0
        )
        delta -= grad_lse
        alive = alive | (grad_lse != 0.0)
    at = pair * length + m
    lse = tl.load(LSE + at, mask=m < length, other=0.0)
    tl.store(DELTA + at, tl.where(alive, delta, 0.0), mask=m < length)
    tl.store(ROW_LSE + at, tl.where(alive, lse, float("-inf")), mask=m < length)
    q = tl.load(Q + batch * q_at[0] + head * q_at[1] + m[:, None] * q_at[2] + d[None, :], mask=ok, other=0.0)
    room = ROOM + batch * room_at[0] + head * room_at[1] + m[:, None] * room_at[2] + d[None, :]
    tl.store(room, tl.where(alive[:, None], q, 0.0), mask=ok)


@triton.jit
def _query_step(
    q, grad, tiles, j, grad_q, lse2, delta, weights, scale2, row, row_ok, d_ok, extras, CUT: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """The gradient of the queries after one more block of keys, from ``j`` on; ``CUT`` where some row may not see all of it."""
    n, at = tl.arange(0, C.N), tl.cast(j, tl.int64)
    inside = (j + n) < tiles.keys.count
    key = tiles.keys.first + (j + n) * tiles.keys.step
    held = inside
    if C.PADDED and CUT:
        held = inside & (padding_of(extras, key, inside, CUT) == 0)
    k = load_tile(tiles.k + at * tiles.k_step, held, d_ok, CUT, C)
    v = load_tile(tiles.v + at * tiles.v_step, held, d_ok, CUT, C)
    if C.PADDED and not CUT:
        held = padding_of(extras, key, inside, CUT) == 0
        k, v = tl.where(held[:, None], k, 0.0), tl.where(held[:, None], v, 0.0)
    s = tl.dot(q, tl.trans(k), input_precision=C.PRECISION) * scale2
    if C.BIASED:
        s += bias_of(extras, key[None, :] - row[:, None], row_ok[:, None] & inside[None, :] if CUT else row_ok[:, None])
    p = exponentials(s, lse2, weights, C)
    if CUT:
        seen = n[None, :] <= (tiles.last - j)[:, None]
        if C.PADDED:
            seen = seen & held[None, :]
        p = tl.where(seen, p, 0.0)
    elif C.PADDED:
        p = tl.where(held[None, :], p, 0.0)
    grad_p = tl.dot(grad, tl.trans(v), input_precision=C.PRECISION)
    grad_s = p * (grad_p - delta[:, None])
    return tl.dot(grad_s.to(k.dtype), k, grad_q, input_precision=C.PRECISION)


@triton.jit
def query_kernel(
    Q, K, V, GRAD_OUT, LSE, DELTA, PADDING, BIAS, OFFSETS, GRAD_Q,
    q_at, k_at, v_at, grad_at, lse_at, padding_at, bias_at, grad_q_at, sizes, nest, C: tl.constexpr,
):  # fmt: skip
    """Gradients of ``M`` query rows of one class, added to what earlier nests left if ``MERGE``."""
    block = locate(OFFSETS, sizes, nest, C.M, C.CAUSAL, C)
    if block.first_row >= block.count:
        return
    batch, q_head, kv_head = heads_of(block, sizes)
    d, row, d_ok, row_ok, stored = own_rows(block, C.M, C)
    row_wide = row.to(tl.int64)
    q = tl.load(head_rows(Q, q_at, batch, q_head) + row_wide[:, None] * q_at[2] + d[None, :], mask=stored, other=0.0)
    grad_rows = head_rows(GRAD_OUT, grad_at, batch, q_head) + row_wide[:, None] * grad_at[2] + d[None, :]
    grad = tl.load(grad_rows, mask=stored, other=0.0)
    lse = tl.load(head_rows(LSE, lse_at, batch, q_head) + row_wide * lse_at[2], mask=row_ok, other=float("-inf"))
    # A row without keys, or a dead one, has lse -inf and probabilities 0; a dead one's query may be anything.
    nothing = lse == float("-inf")
    lse2 = tl.where(nothing, float("inf"), lse) * LOG2E
    delta = tl.load(head_rows(DELTA, lse_at, batch, q_head) + row_wide * lse_at[2], mask=row_ok, other=0.0)
    k_rows = head_rows(K, k_at, batch, kv_head) + d[None, :]
    v_rows = head_rows(V, v_at, batch, kv_head) + d[None, :]
    extras = extras_of(PADDING, BIAS, padding_at, bias_at, batch, q_head)
    scale2 = sizes.scale * LOG2E
    grad_q = accumulator(C.M, C.D_BLOCK)

    for index in tl.range(0, ranges_of(block, C)):
        tiles, whole = key_tiles(index, k_rows, v_rows, k_at, v_at, block, row, sizes, nest, C)
        weights = range_weights(tiles.keys, block, sizes, nest, C)
        for j in tl.range(0, whole, C.N, num_stages=C.STAGES):
            grad_q = _query_step(
                q, grad, tiles, j, grad_q, lse2, delta, weights, scale2, row, row_ok, d_ok, extras, False, C
            )
        for j in tl.range(whole, tiles.keys.count, C.N, num_stages=C.STAGES):
            grad_q = _query_step(
                q, grad, tiles, j, grad_q, lse2, delta, weights, scale2, row, row_ok, d_ok, extras, True, C
            )

    grad_q = tl.where(nothing[:, None], 0.0, grad_q * sizes.scale)
    at_rows = head_rows(GRAD_Q, grad_q_at, batch, q_head) + row_wide[:, None] * grad_q_at[2] + d[None, :]
    if C.MERGE:
        grad_q += tl.load(at_rows, mask=stored, other=0.0).to(tl.float32)
    tl.store(at_rows, grad_q.to(GRAD_Q.dtype.element_ty), mask=stored)


@triton.jit
def _statistics(both, COPIES: tl.constexpr):
    """(lse, delta) of rows, given both in turn, ``COPIES`` times (M, 2 * COPIES)."""
    if COPIES == 1:
        return tl.split(both)
    else:
        M: tl.constexpr = both.shape[0]
        lses, deltas = tl.split(tl.reshape(both, [M, 2, 2]))
        lse, _ = tl.split(lses)
        delta, _ = tl.split(deltas)
        return lse, delta


@triton.jit
def _key_value_step(
    k, v, q_row, grad_row, both_row, steps, queries, i, grad_k, grad_v, weights, scale2, key, key_ok, held, d, d_ok, extras,
    CUT: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """(grad_k, grad_v) after one more block of queries, from ``i`` on, whose first row the pointers are of.

    ``CUT`` where a key may not be seen by all of it.
    """
    m = tl.arange(0, C.M)
    inside = (i + m) < queries.count
    row = queries.first + (i + m) * queries.step
    q = load_tile(q_row + (m[:, None] * steps[0] + d[None, :]), inside, d_ok, CUT, C)
    # Rows past the end have query and gradient 0: they add 0 whatever their probabilities are.
    both_rows = both_row + m[:, None] * steps[2]
    both = tl.load(both_rows, mask=inside[:, None], other=0.0) if CUT else tl.load(both_rows)
    lse, delta = _statistics(both, C.COPIES)
    shift = tl.where(lse == float("-inf"), float("-inf"), lse * -LOG2E)
    if C.WEIGHTED:
        shift += weights
    s = tl.dot(k, tl.trans(q), input_precision=C.PRECISION) * scale2
    if C.BIASED:
        s += bias_of(extras, key[:, None] - row[None, :], key_ok[:, None] & inside[None, :])
    p = tl.exp2(s + shift[None, :])
    if C.CAUSAL and CUT:
        p = tl.where(key[:, None] <= row[None, :], p, 0.0)
    if C.PADDED:
        p = tl.where(held[:, None], p, 0.0)
    grad = load_tile(grad_row + (m[:, None] * steps[1] + d[None, :]), inside, d_ok, CUT, C)
    grad_v = tl.dot(p.to(grad.dtype), grad, grad_v, input_precision=C.PRECISION)
    grad_p = tl.dot(v, tl.trans(grad), input_precision=C.PRECISION)
    grad_s = p * (grad_p - delta[None, :])
    return tl.dot(grad_s.to(q.dtype), q, grad_k, input_precision=C.PRECISION), grad_v


@triton.jit
def key_value_kernel(
    Q, K, V, GRAD_OUT, LSE, DELTA, PADDING, BIAS, OFFSETS, GRAD_K, GRAD_V,
    q_at, k_at, v_at, grad_at, lse_at, padding_at, bias_at, grad_k_at, grad_v_at, sizes, nest, C: tl.constexpr,
):  # fmt: skip
    """Gradients of ``N`` keys and values of one class by one query head, added to what earlier nests left if ``MERGE``."""
    M: tl.constexpr = C.M
    N: tl.constexpr = C.N
    block = locate(OFFSETS, sizes, nest, N, False, C)
    if block.first_row >= block.count:
        return
    batch, q_head, kv_head = heads_of(block, sizes)
    d, key, d_ok, key_ok, stored = own_rows(block, N, C)
    key_wide = key.to(tl.int64)
    extras = extras_of(PADDING, BIAS, padding_at, bias_at, batch, q_head)
    held = key_ok
    if C.PADDED:
        held = key_ok & (padding_of(extras, key, key_ok, True) == 0)
    loaded = held[:, None] & d_ok[None, :]
    k = tl.load(head_rows(K, k_at, batch, kv_head) + key_wide[:, None] * k_at[2] + d[None, :], mask=loaded, other=0.0)
    v = tl.load(head_rows(V, v_at, batch, kv_head) + key_wide[:, None] * v_at[2] + d[None, :], mask=loaded, other=0.0)
    q_rows, grad_rows = head_rows(Q, q_at, batch, q_head), head_rows(GRAD_OUT, grad_at, batch, q_head)
    lse_rows, delta_rows = head_rows(LSE, lse_at, batch, q_head), head_rows(DELTA, lse_at, batch, q_head)
    # One load for both, of at least an element per thread. Of fewer Triton has each thread copy all that it needs one by
    # one, sixteen of each, and their pointers take the registers of the products.
    both_rows = tl.where(tl.arange(0, 2 * C.COPIES)[None, :] % 2 == 0, lse_rows, delta_rows)
    scale2 = sizes.scale * LOG2E
    grad_k = accumulator(N, C.D_BLOCK)
    grad_v = accumulator(N, C.D_BLOCK)

    for index in tl.range(0, ranges_of(block, C)):
        begin = 0
        clear = 0
        if index == 0:
            queries = own_range(block, sizes, nest, C)
            if C.CAUSAL:
                # Queries before the first key see none, queries from the last key on see all.
                seen = (block.origin + block.first_row * block.step - queries.first) // queries.step
                begin = seen // M * M
                clear = tl.cdiv(seen + (N - 1) * (block.step // queries.step), M) * M
        else:
            queries = outer_range(index, block, sizes, nest, True, C)
        clear = tl.minimum(clear, tl.cdiv(queries.count, M) * M)
        whole = queries.count // M * M
        first, step = tl.cast(queries.first, tl.int64), tl.cast(queries.step, tl.int64)
        steps = step * q_at[2], step * grad_at[2], step * lse_at[2]
        q_row, grad_row, both_row = (
            q_rows + first * q_at[2],
            grad_rows + first * grad_at[2],
            both_rows + first * lse_at[2],
        )
        weights = 0.0
        if C.WEIGHTED:
            weights = range_weights(queries, block, sizes, nest, C)
            weights = tl.reshape(tl.broadcast_to(weights[None, :], [M // C.PERIOD, C.PERIOD]), [M])
        # Query blocks that the diagonal crosses and one that the end cuts, then those between, which see every key.
        crossed = (clear - begin) // M
        ragged = ((whole < queries.count) & (clear <= whole)).to(tl.int32)
        for number in tl.range(0, crossed + ragged, num_stages=C.STAGES):
            i = tl.where(number < crossed, begin + number * M, whole)
            at = tl.cast(i, tl.int64)
            grad_k, grad_v = _key_value_step(
                k, v, q_row + at * steps[0], grad_row + at * steps[1], both_row + at * steps[2], steps, queries, i,
                grad_k, grad_v, weights, scale2, key, key_ok, held, d, d_ok, extras, True, C,
            )  # fmt: skip
        # The loop carries its pointers: sums of what it does not change would be kept for each of a tile's rows.
        at = tl.cast(clear, tl.int64)
        q_row, grad_row, both_row = q_row + at * steps[0], grad_row + at * steps[1], both_row + at * steps[2]
        for i in tl.range(clear, whole, M, num_stages=C.STAGES):
            grad_k, grad_v = _key_value_step(
                k, v, q_row, grad_row, both_row, steps, queries, i,
                grad_k, grad_v, weights, scale2, key, key_ok, held, d, d_ok, extras, False, C,
            )  # fmt: skip
            q_row, grad_row, both_row = q_row + M * steps[0], grad_row + M * steps[1], both_row + M * steps[2]

    grad_k *= sizes.scale
    k_out = head_rows(GRAD_K, grad_k_at, batch, q_head) + key_wide[:, None] * grad_k_at[2] + d[None, :]
    v_out = head_rows(GRAD_V, grad_v_at, batch, q_head) + key_wide[:, None] * grad_v_at[2] + d[None, :]
    if C.MERGE:
        grad_k += tl.load(k_out, mask=stored, other=0.0).to(tl.float32)
        grad_v += tl.load(v_out, mask=stored, other=0.0).to(tl.float32)
    tl.store(k_out, grad_k.to(GRAD_K.dtype.element_ty), mask=stored)
    tl.store(v_out, grad_v.to(GRAD_V.dtype.element_ty), mask=stored)
