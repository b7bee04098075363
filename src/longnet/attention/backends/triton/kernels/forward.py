"""The forward kernel: one online softmax over every branch of a nest, keys and values read where they lie."""

from __future__ import annotations

import triton
import triton.language as tl

from longnet.attention.backends.triton.kernels.rows import key_range, locate, range_weights, weighted_shift

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def forward_kernel(
    Q, K, V, OUT, LSE, PADDING, BIAS,
    q_at, k_at, v_at, out_at, lse_at, padding_at, bias_at,
    length, heads, group, scale, segments, tiles,
    segment_lengths, rates, class_level, class_inner, class_step, class_first, class_tiles,
    D: tl.constexpr, D_BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    BRANCHES: tl.constexpr, CLASSES: tl.constexpr, WEIGHTED: tl.constexpr, BLOCKED: tl.constexpr,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, BIASED: tl.constexpr, MERGE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, PERIOD: tl.constexpr,
):  # fmt: skip
    """``M`` query rows of one class: out and lse, mixed into what earlier nests left if ``MERGE``."""
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
    row_wide = row.to(tl.int64)[:, None]
    stored = row_ok[:, None] & d_ok[None, :]
    q = tl.load(Q + batch * q_at[0] + q_head * q_at[1] + row_wide * q_at[2] + d[None, :], mask=stored, other=0.0)
    k_head = K + batch * k_at[0] + kv_head * k_at[1] + d[None, :]
    v_head = V + batch * v_at[0] + kv_head * v_at[1] + d[None, :]
    scale2 = scale * LOG2E
    highest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D_BLOCK], tl.float32)

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
        # Key blocks that every row sees whole, then the ones that the diagonal or the end cuts.
        for j in tl.range(0, whole, N, num_stages=STAGES):
            at = tl.cast(j, tl.int64)
            if D == D_BLOCK:
                k = tl.load(k_tile + at * k_step)
            else:
                k = tl.load(k_tile + at * k_step, mask=d_ok[None, :], other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if PADDED or BIASED:
                s *= scale2
                key = first_key + (j + n) * key_step
                if BIASED:
                    s += LOG2E * tl.load(
                        BIAS + q_head * bias_at[0] + (key[None, :] - row[:, None] + bias_at[1]),
                        mask=row_ok[:, None],
                        other=0.0,
                    )
                if PADDED:
                    gone = tl.load(PADDING + batch * padding_at[0] + key.to(tl.int64) * padding_at[1]) != 0
                    s = tl.where(gone[None, :], float("-inf"), s)
                new = tl.maximum(highest, tl.max(s, 1))
                base = tl.where(new == float("-inf"), 0.0, new)
            else:
                new = tl.maximum(highest, tl.max(s, 1) * scale2)
                base = new
                s = s * scale2
            if WEIGHTED:
                p = tl.exp2(s + weighted_shift(weights, base, M, N, PERIOD))
            else:
                p = tl.exp2(s - base[:, None])
            fade = tl.exp2(highest - base)
            total = total * fade + tl.sum(p, 1)
            acc = acc * fade[:, None]
            if D == D_BLOCK:
                v = tl.load(v_tile + at * v_step)
            else:
                v = tl.load(v_tile + at * v_step, mask=d_ok[None, :], other=0.0)
            if PADDED:
                # Whatever a padded value holds (a NaN, say) must not reach 0 * value.
                v = tl.where(gone[:, None], 0.0, v)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
            highest = new
        for j in tl.range(whole, count, N, num_stages=STAGES):
            at = tl.cast(j, tl.int64)
            inside = (j + n) < count
            key = first_key + (j + n) * key_step
            k = tl.load(k_tile + at * k_step, mask=inside[:, None] & d_ok[None, :], other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if BIASED:
                s *= scale2
                s += LOG2E * tl.load(
                    BIAS + q_head * bias_at[0] + (key[None, :] - row[:, None] + bias_at[1]),
                    mask=row_ok[:, None] & inside[None, :], other=0.0,
                )  # fmt: skip
            seen = n[None, :] <= (last - j)[:, None]
            if PADDED:
                gone = (
                    tl.load(PADDING + batch * padding_at[0] + key.to(tl.int64) * padding_at[1], mask=inside, other=1)
                    != 0
                )
                seen = seen & (~gone)[None, :]
            s = tl.where(seen, s, float("-inf"))
            if not BIASED:
                new = tl.maximum(highest, tl.max(s, 1) * scale2)
                s = s * scale2
            else:
                new = tl.maximum(highest, tl.max(s, 1))
            # A row that has seen no key yet subtracts 0: exp2(-inf - -inf) would be NaN.
            base = tl.where(new == float("-inf"), 0.0, new)
            if WEIGHTED:
                p = tl.exp2(s + weighted_shift(weights, base, M, N, PERIOD))
            else:
                p = tl.exp2(s - base[:, None])
            fade = tl.exp2(highest - base)
            total = total * fade + tl.sum(p, 1)
            acc = acc * fade[:, None]
            v = tl.load(v_tile + at * v_step, mask=inside[:, None] & d_ok[None, :], other=0.0)
            if PADDED:
                v = tl.where(gone[:, None], 0.0, v)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
            highest = new

    # Not "greater": the total of a query that is NaN is NaN, and so is its lse.
    some = total != 0.0
    out = acc / tl.where(some, total, 1.0)[:, None]
    lse = tl.where(some, highest * LN2 + tl.log(tl.where(some, total, 1.0)), float("-inf"))
    out_rows = OUT + batch * out_at[0] + q_head * out_at[1] + row_wide * out_at[2] + d[None, :]
    lse_rows = LSE + batch * lse_at[0] + q_head * lse_at[1] + row.to(tl.int64) * lse_at[2]
    if MERGE:
        before = tl.load(lse_rows, mask=row_ok, other=float("-inf"))
        top = tl.maximum(before, lse)
        base = tl.where(top == float("-inf"), 0.0, top)
        ours, theirs = tl.exp(lse - base), tl.exp(before - base)
        both = ours + theirs
        some = both != 0.0
        both = tl.where(some, both, 1.0)
        previous = tl.load(out_rows, mask=stored, other=0.0).to(tl.float32)
        out = previous + (ours / both)[:, None] * (out - previous)
        lse = tl.where(some, base + tl.log(both), float("-inf"))
    tl.store(out_rows, out.to(OUT.dtype.element_ty), mask=stored)
    tl.store(lse_rows, lse, mask=row_ok)
