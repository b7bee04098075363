"""The backward kernels: exact gradients of the joint softmax from the merged out and lse, without atomics.

Every program owns the rows whose gradient it sums: queries in one kernel, keys and values in another. That computes the
scores twice, and makes every run bit-identical.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longnet.attention.backends.triton.kernels.forward import LOG2E
from longnet.attention.backends.triton.kernels.rows import (
    head_offset,
    key_range,
    locate,
    outer_range,
    range_weights,
    weighted_shift,
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
def query_kernel(
    Q, K, V, GRAD_OUT, LSE, DELTA, PADDING, BIAS, GRAD_Q,
    q_at, k_at, v_at, grad_at, lse_at, padding_at, bias_at, grad_q_at,
    length, heads, group, scale, segments, tiles,
    segment_lengths, rates, class_level, class_inner, class_step, class_first, class_tiles,
    D: tl.constexpr, D_BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    BRANCHES: tl.constexpr, CLASSES: tl.constexpr, WEIGHTED: tl.constexpr, BLOCKED: tl.constexpr,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, BIASED: tl.constexpr, MERGE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, PERIOD: tl.constexpr,
):  # fmt: skip
    """Gradients of ``M`` query rows of one class, added to what earlier nests left if ``MERGE``."""
    batch, head, start, size, level, origin, step, first_row, rows = locate(
        tl.program_id(0), length, heads, segments, tiles, segment_lengths,
        class_level, class_inner, class_step, class_first, class_tiles, CLASSES, M, BLOCKED, CAUSAL,
    )  # fmt: skip
    if first_row >= rows:
        return
    batch, q_head, kv_head = tl.cast(batch, tl.int64), tl.cast(head, tl.int64), tl.cast(head // group, tl.int64)
    d, m, n = tl.arange(0, D_BLOCK), first_row + tl.arange(0, M), tl.arange(0, N)
    row_ok, d_ok = m < rows, d < D
    row = origin + m * step
    row_wide = row.to(tl.int64)
    stored = row_ok[:, None] & d_ok[None, :]
    q = tl.load(
        Q + batch * q_at[0] + q_head * q_at[1] + row_wide[:, None] * q_at[2] + d[None, :], mask=stored, other=0.0
    )
    grad = tl.load(
        GRAD_OUT + batch * grad_at[0] + q_head * grad_at[1] + row_wide[:, None] * grad_at[2] + d[None, :],
        mask=stored, other=0.0,
    )  # fmt: skip
    lse = tl.load(LSE + batch * lse_at[0] + q_head * lse_at[1] + row_wide * lse_at[2], mask=row_ok, other=float("-inf"))
    # A row without keys, or a dead one, has lse -inf and probabilities 0; a dead one's query may be anything.
    nothing = lse == float("-inf")
    lse2 = tl.where(nothing, float("inf"), lse) * LOG2E
    delta = tl.load(DELTA + batch * lse_at[0] + q_head * lse_at[1] + row_wide * lse_at[2], mask=row_ok, other=0.0)
    k_head = K + batch * k_at[0] + kv_head * k_at[1] + d[None, :]
    v_head = V + batch * v_at[0] + kv_head * v_at[1] + d[None, :]
    scale2 = scale * LOG2E
    grad_q = tl.zeros([M, D_BLOCK], tl.float32)

    ranges = level if CAUSAL else 2 * level - 1
    for index in tl.range(0, ranges):
        branch, first_key, key_step, whole, count, last = key_range(
            index, start, size, length, head, heads, row, origin + first_row * step, origin + (first_row + M - 1) * step,
            segment_lengths, rates, BRANCHES, CAUSAL, BLOCKED, N,
        )  # fmt: skip
        k_step = tl.cast(key_step, tl.int64) * k_at[2]
        v_step = tl.cast(key_step, tl.int64) * v_at[2]
        k_tile = k_head + tl.cast(first_key, tl.int64) * k_at[2] + n[:, None] * k_step
        v_tile = v_head + tl.cast(first_key, tl.int64) * v_at[2] + n[:, None] * v_step
        if WEIGHTED:
            weights = range_weights(branch, key_step, level, head, heads, rates, BRANCHES, PERIOD, BLOCKED)
        for j in tl.range(0, whole, N, num_stages=STAGES):
            at = tl.cast(j, tl.int64)
            if D == D_BLOCK:
                k = tl.load(k_tile + at * k_step)
                v = tl.load(v_tile + at * v_step)
            else:
                k = tl.load(k_tile + at * k_step, mask=d_ok[None, :], other=0.0)
                v = tl.load(v_tile + at * v_step, mask=d_ok[None, :], other=0.0)
            if PADDED or BIASED:
                key = first_key + (j + n) * key_step
            if PADDED:
                gone = tl.load(PADDING + batch * padding_at[0] + key.to(tl.int64) * padding_at[1]) != 0
                k = tl.where(gone[:, None], 0.0, k)
                v = tl.where(gone[:, None], 0.0, v)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
            if BIASED:
                s += LOG2E * tl.load(
                    BIAS + q_head * bias_at[0] + (key[None, :] - row[:, None] + bias_at[1]),
                    mask=row_ok[:, None],
                    other=0.0,
                )
            if WEIGHTED:
                p = tl.exp2(s + weighted_shift(weights, lse2, M, N, PERIOD))
            else:
                p = tl.exp2(s - lse2[:, None])
            if PADDED:
                p = tl.where(gone[None, :], 0.0, p)
            grad_p = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            grad_s = p * (grad_p - delta[:, None])
            grad_q = tl.dot(grad_s.to(k.dtype), k, grad_q, input_precision=PRECISION)
        for j in tl.range(whole, count, N, num_stages=STAGES):
            at = tl.cast(j, tl.int64)
            inside = (j + n) < count
            key = first_key + (j + n) * key_step
            held = inside
            if PADDED:
                held = inside & (
                    tl.load(PADDING + batch * padding_at[0] + key.to(tl.int64) * padding_at[1], mask=inside, other=1)
                    == 0
                )
            k = tl.load(k_tile + at * k_step, mask=held[:, None] & d_ok[None, :], other=0.0)
            v = tl.load(v_tile + at * v_step, mask=held[:, None] & d_ok[None, :], other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
            if BIASED:
                s += LOG2E * tl.load(
                    BIAS + q_head * bias_at[0] + (key[None, :] - row[:, None] + bias_at[1]),
                    mask=row_ok[:, None] & inside[None, :], other=0.0,
                )  # fmt: skip
            if WEIGHTED:
                p = tl.exp2(s + weighted_shift(weights, lse2, M, N, PERIOD))
            else:
                p = tl.exp2(s - lse2[:, None])
            seen = n[None, :] <= (last - j)[:, None]
            if PADDED:
                seen = seen & held[None, :]
            p = tl.where(seen, p, 0.0)
            grad_p = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            grad_s = p * (grad_p - delta[:, None])
            grad_q = tl.dot(grad_s.to(k.dtype), k, grad_q, input_precision=PRECISION)

    grad_q = tl.where(nothing[:, None], 0.0, grad_q * scale)
    at_rows = GRAD_Q + batch * grad_q_at[0] + q_head * grad_q_at[1] + row_wide[:, None] * grad_q_at[2] + d[None, :]
    if MERGE:
        grad_q += tl.load(at_rows, mask=stored, other=0.0).to(tl.float32)
    tl.store(at_rows, grad_q.to(GRAD_Q.dtype.element_ty), mask=stored)


@triton.jit
def key_value_kernel(
    Q, K, V, GRAD_OUT, LSE, DELTA, PADDING, BIAS, GRAD_K, GRAD_V,
    q_at, k_at, v_at, grad_at, lse_at, padding_at, bias_at, grad_k_at, grad_v_at,
    length, heads, group, scale, segments, tiles,
    segment_lengths, rates, class_level, class_inner, class_step, class_first, class_tiles,
    D: tl.constexpr, D_BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    BRANCHES: tl.constexpr, CLASSES: tl.constexpr, WEIGHTED: tl.constexpr, BLOCKED: tl.constexpr,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, BIASED: tl.constexpr, MERGE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, PERIOD: tl.constexpr,
):  # fmt: skip
    """Gradients of ``N`` keys and values of one class by one query head, added to what earlier nests left if ``MERGE``."""
    batch, head, start, size, level, origin, step, first_row, rows = locate(
        tl.program_id(0), length, heads, segments, tiles, segment_lengths,
        class_level, class_inner, class_step, class_first, class_tiles, CLASSES, N, BLOCKED, False,
    )  # fmt: skip
    if first_row >= rows:
        return
    batch, q_head, kv_head = tl.cast(batch, tl.int64), tl.cast(head, tl.int64), tl.cast(head // group, tl.int64)
    d, m, n = tl.arange(0, D_BLOCK), tl.arange(0, M), first_row + tl.arange(0, N)
    key_ok, d_ok = n < rows, d < D
    key = origin + n * step
    key_wide = key.to(tl.int64)
    stored = key_ok[:, None] & d_ok[None, :]
    held = key_ok
    if PADDED:
        held = key_ok & (tl.load(PADDING + batch * padding_at[0] + key_wide * padding_at[1], mask=key_ok, other=1) == 0)
    loaded = held[:, None] & d_ok[None, :]
    k = tl.load(
        K + batch * k_at[0] + kv_head * k_at[1] + key_wide[:, None] * k_at[2] + d[None, :], mask=loaded, other=0.0
    )
    v = tl.load(
        V + batch * v_at[0] + kv_head * v_at[1] + key_wide[:, None] * v_at[2] + d[None, :], mask=loaded, other=0.0
    )
    q_head_rows = Q + batch * q_at[0] + q_head * q_at[1] + d[None, :]
    grad_head_rows = GRAD_OUT + batch * grad_at[0] + q_head * grad_at[1] + d[None, :]
    lse_head = LSE + batch * lse_at[0] + q_head * lse_at[1]
    delta_head = DELTA + batch * lse_at[0] + q_head * lse_at[1]
    scale2 = scale * LOG2E
    grad_k = tl.zeros([N, D_BLOCK], tl.float32)
    grad_v = tl.zeros([N, D_BLOCK], tl.float32)

    ranges = level if CAUSAL else 2 * level - 1
    for index in tl.range(0, ranges):
        if index == 0:
            branch = 0
            query_step = rates[0] + 0
            first_query = start + head_offset(head, query_step, heads, BLOCKED)
            count = tl.cdiv(tl.maximum(start + size - first_query, 0), query_step)
            begin = 0
            clear = 0
            if CAUSAL:
                # Queries before the first key see none, queries from the last key on see all.
                seen = (origin + first_row * step - first_query) // query_step
                begin = seen // M * M
                clear = tl.cdiv(seen + (N - 1) * (step // query_step), M) * M
        else:
            branch, first_query, query_step, count = outer_range(
                index, start, length, head, heads, segment_lengths, rates, BRANCHES, CAUSAL, True, BLOCKED
            )
            begin = 0
            clear = 0
        clear = tl.minimum(clear, tl.cdiv(count, M) * M)
        q_step = tl.cast(query_step, tl.int64) * q_at[2]
        grad_step = tl.cast(query_step, tl.int64) * grad_at[2]
        lse_step = tl.cast(query_step, tl.int64) * lse_at[2]
        q_tile = q_head_rows + tl.cast(first_query, tl.int64) * q_at[2] + m[:, None] * q_step
        grad_tile = grad_head_rows + tl.cast(first_query, tl.int64) * grad_at[2] + m[:, None] * grad_step
        lse_tile = lse_head + tl.cast(first_query, tl.int64) * lse_at[2] + m * lse_step
        delta_tile = delta_head + tl.cast(first_query, tl.int64) * lse_at[2] + m * lse_step
        if WEIGHTED:
            weights = range_weights(branch, query_step, level, head, heads, rates, BRANCHES, PERIOD, BLOCKED)
            weights = tl.reshape(tl.broadcast_to(weights[None, :], [M // PERIOD, PERIOD]), [M])
        for phase in tl.static_range(2):
            # Phase 0: query blocks that the diagonal crosses. Phase 1: the later ones, which see every key.
            low = begin if phase == 0 else clear
            high = clear if phase == 0 else count
            for i in tl.range(low, high, M, num_stages=STAGES):
                at = tl.cast(i, tl.int64)
                inside = (i + m) < count
                both = inside[:, None] & d_ok[None, :]
                q = tl.load(q_tile + at * q_step, mask=both, other=0.0)
                lse = tl.load(lse_tile + at * lse_step, mask=inside, other=float("-inf"))
                shift = tl.where(lse == float("-inf"), float("-inf"), lse * -LOG2E)
                if WEIGHTED:
                    shift += weights
                s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale2
                if (CAUSAL and phase == 0) or BIASED:
                    row = first_query + (i + m) * query_step
                if BIASED:
                    s += LOG2E * tl.load(
                        BIAS + q_head * bias_at[0] + (key[:, None] - row[None, :] + bias_at[1]),
                        mask=key_ok[:, None] & inside[None, :], other=0.0,
                    )  # fmt: skip
                p = tl.exp2(s + shift[None, :])
                if CAUSAL and phase == 0:
                    p = tl.where(key[:, None] <= row[None, :], p, 0.0)
                if PADDED:
                    p = tl.where(held[:, None], p, 0.0)
                grad = tl.load(grad_tile + at * grad_step, mask=both, other=0.0)
                grad_v = tl.dot(p.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
                delta = tl.load(delta_tile + at * lse_step, mask=inside, other=0.0)
                grad_p = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
                grad_s = p * (grad_p - delta[None, :])
                grad_k = tl.dot(grad_s.to(q.dtype), q, grad_k, input_precision=PRECISION)

    grad_k *= scale
    k_rows = GRAD_K + batch * grad_k_at[0] + q_head * grad_k_at[1] + key_wide[:, None] * grad_k_at[2] + d[None, :]
    v_rows = GRAD_V + batch * grad_v_at[0] + q_head * grad_v_at[1] + key_wide[:, None] * grad_v_at[2] + d[None, :]
    if MERGE:
        grad_k += tl.load(k_rows, mask=stored, other=0.0).to(tl.float32)
        grad_v += tl.load(v_rows, mask=stored, other=0.0).to(tl.float32)
    tl.store(k_rows, grad_k.to(GRAD_K.dtype.element_ty), mask=stored)
    tl.store(v_rows, grad_v.to(GRAD_V.dtype.element_ty), mask=stored)
