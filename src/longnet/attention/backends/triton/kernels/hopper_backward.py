"""The backward kernels for Hopper GPUs, in Gluon. The mathematics of :mod:`longnet.attention.backends.triton.kernels.backward`.

A program owns the rows whose gradient it sums and sweeps over the other side: queries over keys, keys over queries.
Probabilities and score gradients are operands in registers; they never pass through shared memory.
"""

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
    LOG2E,
    block_weights,
    column_shift,
    fetch,
    limited,
    load_item,
    make_barriers,
    own_parts,
    scores_of,
    split_channels,
    swept_range,
    take_item,
)


@gluon.jit
def _produce(
    descs, shared, folds, ORDER, LIMITS, items, length, heads, group, segments,
    TILES: gl.constexpr, SHAPE: gl.constexpr, M: gl.constexpr, N: gl.constexpr, CAUSAL: gl.constexpr,
    BLOCKED: gl.constexpr, STAGES: gl.constexpr, KEYS: gl.constexpr, LIMITED: gl.constexpr,
):  # fmt: skip
    """Copies of both kernels: two owned tensors once an item, two swept ones block by block. ``KEYS`` are owned or swept."""
    own_a, own_b, swept_a, swept_b = descs
    own_a_fold, own_b_fold, swept_a_fold, swept_b_fold = folds
    own_a_smem, own_b_smem, a_smem, b_smem, own_full, own_empty, a_full, a_empty, b_full, b_empty = shared
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
            kv_head = head // group
            own_head = kv_head if KEYS else head
            swept_head = head if KEYS else kv_head
            mbarrier.wait(own_empty.index(0), (turn & 1) ^ 1)
            mbarrier.expect(own_full.index(0), 2 * own_a[0].block_type.nbytes)
            fetch(own_a, own_a_fold, batch, own_head, origin, step, own_full.index(0), own_a_smem, first_row, RATES)
            fetch(own_b, own_b_fold, batch, own_head, origin, step, own_full.index(0), own_b_smem, first_row, RATES)
            turn += 1
            ranges = level if CAUSAL else 2 * level - 1
            for index in range(0, ranges):
                branch, first, swept_step, count = swept_range(
                    index, start, size, length, head, heads, SHAPE, CAUSAL, KEYS, BLOCKED
                )
                count = limited(count, LIMITS, branch, first, swept_step, head, SHAPE, LIMITED)
                low = 0
                if CAUSAL:
                    if index == 0:
                        if KEYS:
                            low = ((origin + first_row * step - first) // RATES[0]) // N
                        else:
                            count = gl.minimum(count, (origin + (first_row + M - 1) * step - first) // RATES[0] + 1)
                blocks = gl.cdiv(count, N)
                for i in range(0, blocks - low):
                    j = (blocks - 1 - i) * N
                    stage = done % STAGES
                    phase = ((done // STAGES) & 1) ^ 1
                    mbarrier.wait(a_empty.index(stage), phase)
                    mbarrier.expect(a_full.index(stage), swept_a[0].block_type.nbytes)
                    fetch(
                        swept_a,
                        swept_a_fold,
                        batch,
                        swept_head,
                        first,
                        swept_step,
                        a_full.index(stage),
                        a_smem.index(stage),
                        j,
                        RATES,
                    )
                    mbarrier.wait(b_empty.index(stage), phase)
                    mbarrier.expect(b_full.index(stage), swept_b[0].block_type.nbytes)
                    fetch(
                        swept_b,
                        swept_b_fold,
                        batch,
                        swept_head,
                        first,
                        swept_step,
                        b_full.index(stage),
                        b_smem.index(stage),
                        j,
                        RATES,
                    )
                    done += 1


@gluon.jit
def _skip(shared, done, STAGES: gl.constexpr):
    """Pass over a block that only the other warpgroup needs."""
    own_a_smem, own_b_smem, a_smem, b_smem, own_full, own_empty, a_full, a_empty, b_full, b_empty = shared
    stage = done % STAGES
    mbarrier.wait(a_full.index(stage), (done // STAGES) & 1)
    mbarrier.arrive(a_empty.index(stage))
    mbarrier.wait(b_full.index(stage), (done // STAGES) & 1)
    mbarrier.arrive(b_empty.index(stage))


@gluon.jit
def _query_block(
    q, grad, zero, shared, acc, lse2, delta, weights, last, scale2, done,
    N: gl.constexpr, D: gl.constexpr, CHANNELS: gl.constexpr, CUT: gl.constexpr, WEIGHTED: gl.constexpr,
    STAGES: gl.constexpr, SCORES: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """One block of keys, added to ``acc``."""
    own_a_smem, own_b_smem, k_smem, v_smem, own_full, own_empty, k_full, k_empty, v_full, v_empty = shared
    stage = done % STAGES
    phase = (done // STAGES) & 1
    # Of one matrix of scores.
    PRODUCTS: gl.constexpr = 2 if split_channels(CHANNELS, D) else 1
    mbarrier.wait(k_full.index(stage), phase)
    next_s = scores_of(q, k_smem.index(stage), zero, CHANNELS, D)
    mbarrier.wait(v_full.index(stage), phase)
    next_p = scores_of(grad, v_smem.index(stage), zero, CHANNELS, D)
    s = warpgroup_mma_wait(PRODUCTS, deps=(next_s,))
    if WEIGHTED:
        parts = gl.reshape(s, [s.shape[0], N // weights.shape[0], weights.shape[0]])
        p = gl.exp2(parts * scale2 + column_shift(parts, weights, lse2))
        p = gl.convert_layout(gl.reshape(p, [s.shape[0], N]), SCORES)
    else:
        p = gl.exp2(s * scale2 - lse2[:, None])
    if CUT:
        p = gl.where(gl.arange(0, N, layout=gl.SliceLayout(0, SCORES))[None, :] <= last[:, None], p, 0.0)
    grad_p = warpgroup_mma_wait(0, deps=(next_p,))
    mbarrier.arrive(v_empty.index(stage))
    grad_s = p * (grad_p - delta[:, None])
    grad_s = gl.convert_layout(grad_s.to(k_smem.dtype), OPERAND)
    next_acc = warpgroup_mma(grad_s, k_smem.index(stage), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(next_acc,))
    mbarrier.arrive(k_empty.index(stage))
    return acc


@gluon.jit
def _consume_keys(
    shared, LSE, DELTA, GRAD_Q, lse_at, grad_q_at, ORDER, items, length, heads, segments, scale,
    WHICH: gl.constexpr, TILES: gl.constexpr, SHAPE: gl.constexpr, M: gl.constexpr, N: gl.constexpr, D: gl.constexpr,
    CHANNELS: gl.constexpr,
    WEIGHTED: gl.constexpr, PERIOD: gl.constexpr, CAUSAL: gl.constexpr, BLOCKED: gl.constexpr, MERGE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    q_smem, grad_smem, k_smem, v_smem, own_full, own_empty, k_full, k_empty, v_full, v_empty = shared
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    outs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, scores)
    operand: gl.constexpr = gl.DotOperandLayout(0, outs, 2)
    zero = gl.zeros([HALF, N], gl.float32, layout=scores)
    q = own_parts(q_smem.slice(WHICH * HALF, HALF), CHANNELS, D)
    grad = own_parts(grad_smem.slice(WHICH * HALF, HALF), CHANNELS, D)
    scale2 = scale * LOG2E
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
            at = (
                gl.cast(batch, gl.int64) * lse_at[0]
                + gl.cast(head, gl.int64) * lse_at[1]
                + (origin + m * step).to(gl.int64) * lse_at[2]
            )
            lse = gl.load(LSE + at, mask=m < rows, other=float("-inf"))
            # A row without keys, or a dead one, has lse -inf and probabilities 0; a dead one's query may be anything.
            lse2 = gl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
            delta = gl.load(DELTA + at, mask=m < rows, other=0.0)
            acc = gl.zeros([HALF, D], gl.float32, layout=outs)
            mbarrier.wait(own_full.index(0), turn & 1)
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
                if CAUSAL:
                    if index == 0:
                        ratio = step // SHAPE[1][0]
                        seen = (origin - first_key) // SHAPE[1][0] + own_first * ratio
                        last = gl.minimum(last, (origin - first_key) // SHAPE[1][0] + m * ratio)
                        all_top = (gl.minimum(count, seen + (M - 1 - WHICH * HALF) * ratio + 1) - 1) // N
                        top = gl.minimum(all_top, (seen + (HALF - 1) * ratio) // N)
                        whole = gl.minimum(count, seen + 1)
                        for _ in range(top, all_top):
                            _skip(shared, done, STAGES)
                            done += 1
                clear = gl.minimum(whole // N, top + 1)
                for i in range(0, top + 1 - clear):
                    acc = _query_block(
                        q, grad, zero, shared, acc, lse2, delta, weights, last - (top - i) * N, scale2, done,
                        N, D, CHANNELS, True, WEIGHTED, STAGES, scores, operand,
                    )  # fmt: skip
                    done += 1
                for _ in range(0, clear):
                    acc = _query_block(
                        q, grad, zero, shared, acc, lse2, delta, weights, last, scale2, done,
                        N, D, CHANNELS, False, WEIGHTED, STAGES, scores, operand,
                    )  # fmt: skip
                    done += 1
            mbarrier.arrive(own_empty.index(0))

            m_out = own_first + gl.arange(0, HALF, layout=gl.SliceLayout(1, outs))
            at_out = (origin + m_out * step).to(gl.int64)[:, None] * grad_q_at[2]
            d = gl.arange(0, D, layout=gl.SliceLayout(0, outs))[None, :]
            at_out += d
            at_out += gl.cast(batch, gl.int64) * grad_q_at[0] + gl.cast(head, gl.int64) * grad_q_at[1]
            ok = (m_out < rows)[:, None]
            if CHANNELS < D:
                ok = ok & (d < CHANNELS)
            nothing = gl.convert_layout(lse, gl.SliceLayout(1, outs)) == float("-inf")
            result = gl.where(nothing[:, None], 0.0, acc * scale)
            if MERGE:
                result += gl.load(GRAD_Q + at_out, mask=ok, other=0.0).to(gl.float32)
            gl.store(GRAD_Q + at_out, result.to(GRAD_Q.dtype.element_ty), mask=ok)


@gluon.jit
def _statistics(lse_rows, delta_rows, weights, inside):
    """(shift, delta) of a block of queries: what is added to a scaled score before the exponential, and delta."""
    lse = gl.load(lse_rows, mask=inside, other=float("-inf"))
    # A row without keys has lse -inf and probabilities 0.
    shift = gl.where(lse == float("-inf"), float("-inf"), weights - lse * LOG2E)
    return shift, gl.load(delta_rows, mask=inside, other=0.0)


@gluon.jit
def _key_block(
    k, v, zero, shared, acc_k, acc_v, statistics, low, high, scale2, done,
    N: gl.constexpr, D: gl.constexpr, CHANNELS: gl.constexpr, CUT: gl.constexpr, PENDING: gl.constexpr,
    STAGES: gl.constexpr, SCORES: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """One block of queries, added to ``acc_k`` and ``acc_v``, which are on their way when it returns.

    The products of the block before, where they are ``PENDING``, run until this one's scores follow them, so that matrix
    units have no gap from one block to the next.
    Queries from column ``low`` of a key's row up to column ``high`` see the key, where ``CUT``.
    """
    own_a_smem, own_b_smem, q_smem, g_smem, own_full, own_empty, q_full, q_empty, g_full, g_empty = shared
    stage = done % STAGES
    phase = (done // STAGES) & 1
    column: gl.constexpr = gl.SliceLayout(0, SCORES)
    # Of one matrix of scores.
    PRODUCTS: gl.constexpr = 2 if split_channels(CHANNELS, D) else 1
    mbarrier.wait(q_full.index(stage), phase)
    next_s = scores_of(k, q_smem.index(stage), zero, CHANNELS, D)
    if PENDING:
        acc_k, acc_v = warpgroup_mma_wait(PRODUCTS, deps=(acc_k, acc_v))
        _release(shared, done - 1, STAGES)
    mbarrier.wait(g_full.index(stage), phase)
    next_p = scores_of(v, g_smem.index(stage), zero, CHANNELS, D)
    shift = statistics.index(done % 2 * 2).load(column)
    s = warpgroup_mma_wait(PRODUCTS, deps=(next_s,))
    p = gl.exp2(s * scale2 + shift[None, :])
    if CUT:
        n = gl.arange(0, N, layout=column)
        p = gl.where((n[None, :] >= low[:, None]) & (n <= high)[None, :], p, 0.0)
    acc_v = warpgroup_mma(gl.convert_layout(p.to(q_smem.dtype), OPERAND), g_smem.index(stage), acc_v, is_async=True)
    delta = statistics.index(done % 2 * 2 + 1).load(column)
    grad_p = warpgroup_mma_wait(1, deps=(next_p,))
    grad_s = p * (grad_p - delta[None, :])
    acc_k = warpgroup_mma(
        gl.convert_layout(grad_s.to(q_smem.dtype), OPERAND), q_smem.index(stage), acc_k, is_async=True
    )
    return acc_k, acc_v


@gluon.jit
def _key_blocks(
    k, v, zero, shared, acc_k, acc_v, statistics, lse_rows, delta_rows, back, weights, n, j, seen, count, scale2, done,
    COUNT: gl.constexpr, N: gl.constexpr, D: gl.constexpr, CHANNELS: gl.constexpr, CUT: gl.constexpr,
    STAGES: gl.constexpr, SCORES: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """``COUNT`` blocks from row ``j`` down, whose products run into one another.

    Under each the statistics of the next are read, few by each thread; they reach the others through shared memory.
    """
    for i in gl.static_range(COUNT):
        shift, delta = _statistics(lse_rows - (i + 1) * back, delta_rows - (i + 1) * back, weights, n < j - i * N)
        acc_k, acc_v = _key_block(
            k, v, zero, shared, acc_k, acc_v, statistics, seen - (j - i * N), count - 1 - (j - i * N), scale2, done + i,
            N, D, CHANNELS, CUT, i > 0, STAGES, SCORES, OPERAND,
        )  # fmt: skip
        if i == COUNT - 1:
            acc_k, acc_v = warpgroup_mma_wait(0, deps=(acc_k, acc_v))
            _release(shared, done + i, STAGES)
        statistics.index((done + i + 1) % 2 * 2).store(shift)
        statistics.index((done + i + 1) % 2 * 2 + 1).store(delta)
    return acc_k, acc_v


@gluon.jit
def _release(shared, done, STAGES: gl.constexpr):
    """Give back the stage of a block whose products have ended."""
    own_a_smem, own_b_smem, q_smem, g_smem, own_full, own_empty, q_full, q_empty, g_full, g_empty = shared
    stage = done % STAGES
    mbarrier.arrive(q_empty.index(stage))
    mbarrier.arrive(g_empty.index(stage))


@gluon.jit
def _loaded(parts, LAYOUT: gl.constexpr):
    """An owned operand's parts in registers."""
    if len(parts) == 2:
        return parts[0].load(LAYOUT), parts[1].load(LAYOUT)
    else:
        return (parts[0].load(LAYOUT),)


# Of the parts of a range: how many blocks at a time, and whether some row may not see all of them.
BLOCKS_OF_PART = gl.constexpr((1, 1, 2, 1))
CUT_OF_PART = gl.constexpr((True, False, False, True))


@gluon.jit
def _consume_queries(
    shared, statistics, LSE, DELTA, GRAD_K, GRAD_V, lse_at, grad_k_at, grad_v_at, ORDER, LIMITS, items, length, heads, segments,
    scale,
    WHICH: gl.constexpr, TILES: gl.constexpr, SHAPE: gl.constexpr, M: gl.constexpr, N: gl.constexpr, D: gl.constexpr,
    CHANNELS: gl.constexpr,
    WEIGHTED: gl.constexpr, PERIOD: gl.constexpr, CAUSAL: gl.constexpr, BLOCKED: gl.constexpr, MERGE: gl.constexpr,
    STAGES: gl.constexpr, LIMITED: gl.constexpr,
):  # fmt: skip
    k_smem, v_smem, q_smem, g_smem, own_full, own_empty, q_full, q_empty, g_full, g_empty = shared
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    outs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, scores)
    operand: gl.constexpr = gl.DotOperandLayout(0, outs, 2)
    zero = gl.zeros([HALF, N], gl.float32, layout=scores)
    linear: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    left: gl.constexpr = gl.DotOperandLayout(0, scores, 2)
    scale2 = scale * LOG2E
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
            head_at = gl.cast(batch, gl.int64) * lse_at[0] + gl.cast(head, gl.int64) * lse_at[1]
            acc_k = gl.zeros([HALF, D], gl.float32, layout=outs)
            acc_v = gl.zeros([HALF, D], gl.float32, layout=outs)
            mbarrier.wait(own_full.index(0), turn & 1)
            turn += 1
            k = own_parts(k_smem.slice(WHICH * HALF, HALF), CHANNELS, D)
            v = own_parts(v_smem.slice(WHICH * HALF, HALF), CHANNELS, D)
            if D == 64:
                k, v = _loaded(k, left), _loaded(v, left)
            ranges = level if CAUSAL else 2 * level - 1
            # Times 1. Of a single range the compiler knows that there is no loop, arranges what follows differently, and has
            # no registers left for products under way (ptxas says C7511 and waits for each).
            ranges = ranges * ((2 * items - slot - 1) // items)
            for index in range(0, ranges):
                branch, first_query, query_step, count = swept_range(
                    index, start, size, length, head, heads, SHAPE, CAUSAL, True, BLOCKED
                )
                count = limited(count, LIMITS, branch, first_query, query_step, head, SHAPE, LIMITED)
                blocks = gl.cdiv(count, N)
                seen = gl.full([HALF], 0, gl.int32, layout=row_layout)
                # Blocks [clear, blocks) are seen whole but for a ragged last one, [own_low, clear) are cut by the diagonal.
                all_low = 0
                own_low = 0
                clear = 0
                if CAUSAL:
                    if index == 0:
                        ratio = step // SHAPE[1][0]
                        first_seen = (origin - first_query) // SHAPE[1][0] + own_first * ratio
                        seen = (origin - first_query) // SHAPE[1][0] + m * ratio
                        all_low = ((origin - first_query) // SHAPE[1][0] + first_row * ratio) // N
                        own_low = gl.minimum(blocks, first_seen // N)
                        clear = gl.minimum(blocks, gl.cdiv(first_seen + (HALF - 1) * ratio, N))
                ragged = gl.minimum(blocks - clear, (blocks * N > count).to(gl.int32))
                # Statistics are read one block ahead, few by each thread, and reach the others through shared memory.
                n = gl.arange(0, N, layout=linear)
                weights = gl.zeros([N], gl.float32, layout=linear)
                if WEIGHTED:
                    weights = block_weights(branch, query_step, level, head, heads, SHAPE, N, BLOCKED, linear)
                at = head_at + gl.cast(first_query, gl.int64) * lse_at[2]
                lse_step = gl.cast(query_step, gl.int64) * lse_at[2]
                at += ((blocks - 1) * N + n).to(gl.int64) * lse_step
                row = (blocks - 1) * N + n
                # An empty range has no block at all.
                shift, delta = _statistics(LSE + at, DELTA + at, weights, (row >= 0) & (row < count))
                statistics.index(done % 2 * 2).store(shift)
                statistics.index(done % 2 * 2 + 1).store(delta)
                j = (blocks - 1) * N
                whole = gl.maximum(blocks - clear - ragged, 0)
                # A ragged block, an odd one, pairs, and those that the diagonal cuts.
                trips = (ragged, whole % 2, whole // 2, blocks - own_low - ragged - whole)
                for part in gl.static_range(4):
                    for _ in range(0, trips[part]):
                        acc_k, acc_v = _key_blocks(
                            k, v, zero, shared, acc_k, acc_v, statistics, LSE + at, DELTA + at, N * lse_step, weights, n, j,
                            seen, count, scale2, done,
                            BLOCKS_OF_PART[part], N, D, CHANNELS, CUT_OF_PART[part], STAGES, scores, operand,
                        )  # fmt: skip
                        at -= BLOCKS_OF_PART[part] * N * lse_step
                        j -= BLOCKS_OF_PART[part] * N
                        done += BLOCKS_OF_PART[part]
                for _ in range(all_low, own_low):
                    _skip(shared, done, STAGES)
                    done += 1
            mbarrier.arrive(own_empty.index(0))

            m_out = own_first + gl.arange(0, HALF, layout=gl.SliceLayout(1, outs))
            row = (origin + m_out * step).to(gl.int64)[:, None]
            d = gl.arange(0, D, layout=gl.SliceLayout(0, outs))[None, :]
            k_at = (
                row * grad_k_at[2]
                + d
                + gl.cast(batch, gl.int64) * grad_k_at[0]
                + gl.cast(head, gl.int64) * grad_k_at[1]
            )
            v_at = (
                row * grad_v_at[2]
                + d
                + gl.cast(batch, gl.int64) * grad_v_at[0]
                + gl.cast(head, gl.int64) * grad_v_at[1]
            )
            ok = (m_out < rows)[:, None]
            if CHANNELS < D:
                ok = ok & (d < CHANNELS)
            result_k = acc_k * scale
            result_v = acc_v
            if MERGE:
                result_k += gl.load(GRAD_K + k_at, mask=ok, other=0.0).to(gl.float32)
                result_v += gl.load(GRAD_V + v_at, mask=ok, other=0.0).to(gl.float32)
            gl.store(GRAD_K + k_at, result_k.to(GRAD_K.dtype.element_ty), mask=ok)
            gl.store(GRAD_V + v_at, result_v.to(GRAD_V.dtype.element_ty), mask=ok)


@gluon.jit
def hopper_query_kernel(
    LSE, DELTA, GRAD_Q, ORDER,
    q0, q1, q2, q3, q4, g0, g1, g2, g3, g4, k0, k1, k2, k3, k4, v0, v1, v2, v3, v4,
    q_fold, g_fold, k_fold, v_fold, lse_at, grad_q_at,
    items, length, heads, group, scale, segments,
    TILES: gl.constexpr, SHAPE: gl.constexpr, D: gl.constexpr, CHANNELS: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
    WEIGHTED: gl.constexpr, PERIOD: gl.constexpr, BLOCKED: gl.constexpr, CAUSAL: gl.constexpr, MERGE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Gradients of the query rows of one nest, added to what earlier nests left if ``MERGE``."""
    q_smem = gl.allocate_shared_memory(q0.dtype, [M, D], q0.layout)
    g_smem = gl.allocate_shared_memory(g0.dtype, [M, D], g0.layout)
    k_smem = gl.allocate_shared_memory(k0.dtype, [STAGES, N, D], k0.layout)
    v_smem = gl.allocate_shared_memory(v0.dtype, [STAGES, N, D], v0.layout)
    own_full, own_empty = make_barriers(1, 1), make_barriers(1, 2)
    k_full, k_empty = make_barriers(STAGES, 1), make_barriers(STAGES, 2)
    v_full, v_empty = make_barriers(STAGES, 1), make_barriers(STAGES, 2)
    fence_async_shared()
    shared = (q_smem, g_smem, k_smem, v_smem, own_full, own_empty, k_full, k_empty, v_full, v_empty)
    descs = ((q0, q1, q2, q3, q4), (g0, g1, g2, g3, g4), (k0, k1, k2, k3, k4), (v0, v1, v2, v3, v4))
    gl.warp_specialize(
        [
            (
                _consume_keys,
                (
                    shared, LSE, DELTA, GRAD_Q, lse_at, grad_q_at, ORDER, items, length, heads, segments, scale,
                    0, TILES, SHAPE, M, N, D, CHANNELS, WEIGHTED, PERIOD, CAUSAL, BLOCKED, MERGE, STAGES,
                ),
            ),
            (
                _consume_keys,
                (
                    shared, LSE, DELTA, GRAD_Q, lse_at, grad_q_at, ORDER, items, length, heads, segments, scale,
                    1, TILES, SHAPE, M, N, D, CHANNELS, WEIGHTED, PERIOD, CAUSAL, BLOCKED, MERGE, STAGES,
                ),
            ),
            (
                _produce,
                (
                    descs, shared, (q_fold, g_fold, k_fold, v_fold), ORDER, ORDER, items, length, heads, group, segments,
                    TILES, SHAPE, M, N, CAUSAL, BLOCKED, STAGES, False, False,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


@gluon.jit
def hopper_key_value_kernel(
    LSE, DELTA, GRAD_K, GRAD_V, ORDER, LIMITS,
    q0, q1, q2, q3, q4, g0, g1, g2, g3, g4, k0, k1, k2, k3, k4, v0, v1, v2, v3, v4,
    q_fold, g_fold, k_fold, v_fold, lse_at, grad_k_at, grad_v_at,
    items, length, heads, group, scale, segments,
    TILES: gl.constexpr, SHAPE: gl.constexpr, D: gl.constexpr, CHANNELS: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
    WEIGHTED: gl.constexpr, PERIOD: gl.constexpr, BLOCKED: gl.constexpr, CAUSAL: gl.constexpr, MERGE: gl.constexpr,
    STAGES: gl.constexpr, LIMITED: gl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values of one nest by query head, added to what earlier nests left if ``MERGE``.

    Where ``LIMITED``, from the queries before LIMITS (heads, branches) alone.
    """
    k_smem = gl.allocate_shared_memory(k0.dtype, [M, D], k0.layout)
    v_smem = gl.allocate_shared_memory(v0.dtype, [M, D], v0.layout)
    q_smem = gl.allocate_shared_memory(q0.dtype, [STAGES, N, D], q0.layout)
    g_smem = gl.allocate_shared_memory(g0.dtype, [STAGES, N, D], g0.layout)
    own_full, own_empty = make_barriers(1, 1), make_barriers(1, 2)
    q_full, q_empty = make_barriers(STAGES, 1), make_barriers(STAGES, 2)
    g_full, g_empty = make_barriers(STAGES, 1), make_barriers(STAGES, 2)
    fence_async_shared()
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    first_statistics = gl.allocate_shared_memory(gl.float32, [4, N], plain)
    second_statistics = gl.allocate_shared_memory(gl.float32, [4, N], plain)
    shared = (k_smem, v_smem, q_smem, g_smem, own_full, own_empty, q_full, q_empty, g_full, g_empty)
    descs = ((k0, k1, k2, k3, k4), (v0, v1, v2, v3, v4), (q0, q1, q2, q3, q4), (g0, g1, g2, g3, g4))
    gl.warp_specialize(
        [
            (
                _consume_queries,
                (
                    shared, first_statistics, LSE, DELTA, GRAD_K, GRAD_V, lse_at, grad_k_at, grad_v_at,
                    ORDER, LIMITS, items, length, heads, segments, scale,
                    0, TILES, SHAPE, M, N, D, CHANNELS, WEIGHTED, PERIOD, CAUSAL, BLOCKED, MERGE, STAGES, LIMITED,
                ),
            ),
            (
                _consume_queries,
                (
                    shared, second_statistics, LSE, DELTA, GRAD_K, GRAD_V, lse_at, grad_k_at, grad_v_at,
                    ORDER, LIMITS, items, length, heads, segments, scale,
                    1, TILES, SHAPE, M, N, D, CHANNELS, WEIGHTED, PERIOD, CAUSAL, BLOCKED, MERGE, STAGES, LIMITED,
                ),
            ),
            (
                _produce,
                (
                    descs, shared, (k_fold, v_fold, q_fold, g_fold), ORDER, LIMITS, items, length, heads, group, segments,
                    TILES, SHAPE, M, N, CAUSAL, BLOCKED, STAGES, True, LIMITED,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
