"""The forward kernel for Hopper GPUs, in Gluon. The mathematics of :mod:`longnet.attention.backends.triton.kernels.forward`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from longnet.attention.backends.triton.kernels.hopper import (
    HALF,
    LN2,
    LOG2E,
    block_weights,
    column_shift,
    fetch,
    load_item,
    make_barriers,
    own_parts,
    scores_of,
    swept_range,
    take_item,
)


@gluon.jit
def _softmax(
    s,
    highest,
    total,
    weights,
    last,
    scale2,
    N: gl.constexpr,
    CUT: gl.constexpr,
    WEIGHTED: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """(p, fade, highest, total) of one block of scores; ``CUT`` where some row may not see all of its keys."""
    if CUT:
        s = gl.where(gl.arange(0, N, layout=gl.SliceLayout(0, LAYOUT))[None, :] <= last[:, None], s, float("-inf"))
    new = gl.maximum(highest, gl.max(s, 1) * scale2)
    base = new
    if CUT:
        # A row that has seen no key yet subtracts 0: exp2(-inf - -inf) would be NaN.
        base = gl.where(new == float("-inf"), 0.0, new)
    if WEIGHTED:
        parts = gl.reshape(s, [s.shape[0], N // weights.shape[0], weights.shape[0]])
        p = gl.exp2(parts * scale2 + column_shift(parts, weights, base))
        p = gl.convert_layout(gl.reshape(p, [s.shape[0], N]), LAYOUT)
    else:
        p = gl.exp2(s * scale2 - base[:, None])
    fade = gl.exp2(highest - base)
    return p, fade, new, total * fade + gl.sum(p, 1)


@gluon.jit
def _advance(
    q, zero, shared, acc, p_half, highest, total, weights, last, scale2, done,
    N: gl.constexpr, D: gl.constexpr, CHANNELS: gl.constexpr, CUT: gl.constexpr, WEIGHTED: gl.constexpr,
    STAGES: gl.constexpr, SCORES: gl.constexpr, OUTS: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """One block of keys; the product of the block before with its values runs under this one's exponentials."""
    q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty = shared
    stage = done % STAGES
    before = (done - 1) % STAGES
    mbarrier.wait(k_full.index(stage), (done // STAGES) & 1)
    next_s = scores_of(q, k_smem.index(stage), zero, CHANNELS, D)
    mbarrier.wait(v_full.index(before), ((done - 1) // STAGES) & 1)
    next_acc = warpgroup_mma(p_half, v_smem.index(before), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(next_s,))
    mbarrier.arrive(k_empty.index(stage))
    p, fade, highest, total = _softmax(s, highest, total, weights, last, scale2, N, CUT, WEIGHTED, SCORES)
    acc = warpgroup_mma_wait(0, deps=(next_acc,))
    mbarrier.arrive(v_empty.index(before))
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, OUTS))[:, None]
    return acc, gl.convert_layout(p.to(k_smem.dtype), OPERAND), highest, total


@gluon.jit
def _produce(
    descs, shared, folds, ORDER, items, length, heads, group, segments,
    TILES: gl.constexpr, SHAPE: gl.constexpr, M: gl.constexpr, N: gl.constexpr, CAUSAL: gl.constexpr,
    BLOCKED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q_desc, k_desc, v_desc = descs
    q_fold, k_fold, v_fold = folds
    q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty = shared
    RATES: gl.constexpr = SHAPE[1]
    done = 0
    turn = 0
    upcoming = load_item(ORDER, gl.program_id(0), items)
    for slot in range(gl.program_id(0), items, gl.num_programs(0)):
        item = upcoming
        upcoming = load_item(ORDER, slot + gl.num_programs(0), items)
        batch, head, start, size, level, origin, step, first_row, rows = take_item(
            item, length, heads, segments, TILES, SHAPE, M, BLOCKED
        )
        if first_row < rows:
            mbarrier.wait(q_empty.index(0), (turn & 1) ^ 1)
            mbarrier.expect(q_full.index(0), q_desc[0].block_type.nbytes)
            fetch(q_desc, q_fold, batch, head, origin, step, q_full.index(0), q_smem, first_row, RATES)
            turn += 1
            kv_head = head // group
            ranges = level if CAUSAL else 2 * level - 1
            for index in range(0, ranges):
                branch, first_key, key_step, count = swept_range(
                    index, start, size, length, head, heads, SHAPE, CAUSAL, False, BLOCKED
                )
                if CAUSAL:
                    if index == 0:
                        count = gl.minimum(count, (origin + (first_row + M - 1) * step - first_key) // RATES[0] + 1)
                blocks = gl.cdiv(count, N)
                for i in range(0, blocks):
                    # From the diagonal down: a warpgroup skips the blocks past its last row before it starts.
                    j = (blocks - 1 - i) * N
                    stage = done % STAGES
                    phase = ((done // STAGES) & 1) ^ 1
                    mbarrier.wait(k_empty.index(stage), phase)
                    mbarrier.expect(k_full.index(stage), k_desc[0].block_type.nbytes)
                    fetch(
                        k_desc,
                        k_fold,
                        batch,
                        kv_head,
                        first_key,
                        key_step,
                        k_full.index(stage),
                        k_smem.index(stage),
                        j,
                        RATES,
                    )
                    mbarrier.wait(v_empty.index(stage), phase)
                    mbarrier.expect(v_full.index(stage), v_desc[0].block_type.nbytes)
                    fetch(
                        v_desc,
                        v_fold,
                        batch,
                        kv_head,
                        first_key,
                        key_step,
                        v_full.index(stage),
                        v_smem.index(stage),
                        j,
                        RATES,
                    )
                    done += 1


@gluon.jit
def _consume(
    shared, OUT, LSE, out_at, lse_at, ORDER, items, length, heads, segments, scale2,
    WHICH: gl.constexpr, TILES: gl.constexpr, SHAPE: gl.constexpr, M: gl.constexpr, N: gl.constexpr, D: gl.constexpr,
    CHANNELS: gl.constexpr,
    WEIGHTED: gl.constexpr, PERIOD: gl.constexpr, CAUSAL: gl.constexpr, BLOCKED: gl.constexpr, MERGE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty = shared
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    outs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, scores)
    out_rows: gl.constexpr = gl.SliceLayout(1, outs)
    operand: gl.constexpr = gl.DotOperandLayout(0, outs, 2)
    zero = gl.zeros([HALF, N], gl.float32, layout=scores)
    q = own_parts(q_smem.slice(WHICH * HALF, HALF), CHANNELS, D)
    done = 0
    turn = 0
    upcoming = load_item(ORDER, gl.program_id(0), items)
    for slot in range(gl.program_id(0), items, gl.num_programs(0)):
        item = upcoming
        upcoming = load_item(ORDER, slot + gl.num_programs(0), items)
        batch, head, start, size, level, origin, step, first_row, rows = take_item(
            item, length, heads, segments, TILES, SHAPE, M, BLOCKED
        )
        if first_row < rows:
            own_first = first_row + WHICH * HALF
            m = own_first + gl.arange(0, HALF, layout=row_layout)
            highest = gl.full([HALF], float("-inf"), gl.float32, layout=row_layout)
            total = gl.zeros([HALF], gl.float32, layout=row_layout)
            acc = gl.zeros([HALF, D], gl.float32, layout=outs)
            p_half = gl.zeros([HALF, N], k_smem.dtype, layout=operand)
            mbarrier.wait(q_full.index(0), turn & 1)
            turn += 1
            ranges = level if CAUSAL else 2 * level - 1
            for index in range(0, ranges):
                branch, first_key, key_step, count = swept_range(
                    index, start, size, length, head, heads, SHAPE, CAUSAL, False, BLOCKED
                )
                whole = count
                top = gl.cdiv(count, N) - 1
                last = gl.full([HALF], 0, gl.int32, layout=row_layout) + (count - 1)
                weights = block_weights(
                    branch, key_step, level, head, heads, SHAPE, PERIOD, BLOCKED, gl.SliceLayout(0, scores)
                )
                if index == 0:
                    own_top = top
                    if CAUSAL:
                        # Rows of a nest lie on the finest branch's keys, so positions compare as key indices.
                        ratio = step // SHAPE[1][0]
                        seen = (origin - first_key) // SHAPE[1][0] + own_first * ratio
                        last = gl.minimum(last, (origin - first_key) // SHAPE[1][0] + m * ratio)
                        top = (gl.minimum(count, seen + (M - 1 - WHICH * HALF) * ratio + 1) - 1) // N
                        own_top = gl.minimum(top, (seen + (HALF - 1) * ratio) // N)
                        whole = gl.minimum(count, seen + 1)
                    for _ in range(own_top, top):
                        mbarrier.wait(k_full.index(done % STAGES), (done // STAGES) & 1)
                        mbarrier.arrive(k_empty.index(done % STAGES))
                        mbarrier.wait(v_full.index(done % STAGES), (done // STAGES) & 1)
                        mbarrier.arrive(v_empty.index(done % STAGES))
                        done += 1
                    # The first block by itself: nothing runs under its exponentials yet.
                    mbarrier.wait(k_full.index(done % STAGES), (done // STAGES) & 1)
                    first = scores_of(q, k_smem.index(done % STAGES), zero, CHANNELS, D)
                    scored = warpgroup_mma_wait(0, deps=(first,))
                    mbarrier.arrive(k_empty.index(done % STAGES))
                    done += 1
                    p, fade, highest, total = _softmax(
                        scored, highest, total, weights, last - own_top * N, scale2, N, True, WEIGHTED, scores
                    )
                    p_half = gl.convert_layout(p.to(k_smem.dtype), operand)
                    top = own_top - 1
                clear = gl.minimum(whole // N, top + 1)
                for i in range(0, top + 1 - clear):
                    acc, p_half, highest, total = _advance(
                        q, zero, shared, acc, p_half, highest, total, weights, last - (top - i) * N, scale2, done,
                        N, D, CHANNELS, True, WEIGHTED, STAGES, scores, outs, operand,
                    )  # fmt: skip
                    done += 1
                for _ in range(0, clear):
                    acc, p_half, highest, total = _advance(
                        q, zero, shared, acc, p_half, highest, total, weights, last, scale2, done,
                        N, D, CHANNELS, False, WEIGHTED, STAGES, scores, outs, operand,
                    )  # fmt: skip
                    done += 1
            mbarrier.arrive(q_empty.index(0))
            before = (done - 1) % STAGES
            mbarrier.wait(v_full.index(before), ((done - 1) // STAGES) & 1)
            last_acc = warpgroup_mma(p_half, v_smem.index(before), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(last_acc,))
            mbarrier.arrive(v_empty.index(before))

            row = origin + m * step
            row_ok = m < rows
            lse = highest * LN2 + gl.log(total)
            lse_rows = LSE + gl.cast(batch, gl.int64) * lse_at[0] + gl.cast(head, gl.int64) * lse_at[1]
            lse_rows += row.to(gl.int64) * lse_at[2]
            weight = 1.0 / total
            if MERGE:
                earlier = gl.load(lse_rows, mask=row_ok, other=float("-inf"))
                top = gl.maximum(earlier, lse)
                ours, theirs = gl.exp(lse - top), gl.exp(earlier - top)
                both = ours + theirs
                weight = weight * (ours / both)
                keep = gl.convert_layout(theirs / both, out_rows)
                lse = top + gl.log(both)
            out = acc * gl.convert_layout(weight, out_rows)[:, None]
            m_out = first_row + WHICH * HALF + gl.arange(0, HALF, layout=out_rows)
            at = (origin + m_out * step).to(gl.int64)[:, None] * out_at[2]
            d = gl.arange(0, D, layout=gl.SliceLayout(0, outs))[None, :]
            at += d
            at += gl.cast(batch, gl.int64) * out_at[0] + gl.cast(head, gl.int64) * out_at[1]
            ok = (m_out < rows)[:, None]
            if CHANNELS < D:
                ok = ok & (d < CHANNELS)
            if MERGE:
                out += keep[:, None] * gl.load(OUT + at, mask=ok, other=0.0).to(gl.float32)
            gl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=ok)
            gl.store(lse_rows, lse, mask=row_ok)


@gluon.jit
def hopper_forward_kernel(
    OUT, LSE, ORDER,
    q0, q1, q2, q3, q4, k0, k1, k2, k3, k4, v0, v1, v2, v3, v4,
    q_fold, k_fold, v_fold, out_at, lse_at,
    items, length, heads, group, scale, segments,
    TILES: gl.constexpr, SHAPE: gl.constexpr, D: gl.constexpr, CHANNELS: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
    WEIGHTED: gl.constexpr, PERIOD: gl.constexpr, BLOCKED: gl.constexpr, CAUSAL: gl.constexpr, MERGE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Query rows of one nest, ``M`` at a time: out and lse, mixed into what earlier nests left if ``MERGE``."""
    q_smem = gl.allocate_shared_memory(q0.dtype, [M, D], q0.layout)
    k_smem = gl.allocate_shared_memory(k0.dtype, [STAGES, N, D], k0.layout)
    v_smem = gl.allocate_shared_memory(v0.dtype, [STAGES, N, D], v0.layout)
    q_full, q_empty = make_barriers(1, 1), make_barriers(1, 2)
    k_full, k_empty = make_barriers(STAGES, 1), make_barriers(STAGES, 2)
    v_full, v_empty = make_barriers(STAGES, 1), make_barriers(STAGES, 2)
    fence_async_shared()
    shared = (q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty)
    scale2 = scale * LOG2E
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    shared, OUT, LSE, out_at, lse_at, ORDER, items, length, heads, segments, scale2,
                    0, TILES, SHAPE, M, N, D, CHANNELS, WEIGHTED, PERIOD, CAUSAL, BLOCKED, MERGE, STAGES,
                ),
            ),
            (
                _consume,
                (
                    shared, OUT, LSE, out_at, lse_at, ORDER, items, length, heads, segments, scale2,
                    1, TILES, SHAPE, M, N, D, CHANNELS, WEIGHTED, PERIOD, CAUSAL, BLOCKED, MERGE, STAGES,
                ),
            ),
            (
                _produce,
                (
                    ((q0, q1, q2, q3, q4), (k0, k1, k2, k3, k4), (v0, v1, v2, v3, v4)), shared, (q_fold, k_fold, v_fold),
                    ORDER, items, length, heads, group, segments, TILES, SHAPE, M, N, CAUSAL, BLOCKED, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
