"""The backward kernels for Hopper GPUs, in Gluon. The mathematics of :mod:`longnet.attention.backends.triton.kernels.backward`.

A program owns the rows whose gradient it sums and sweeps over the other side: queries over keys, keys over queries.
Probabilities and score gradients are operands in registers; they never pass through shared memory.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from longnet.attention.backends.triton.kernels.hopper import (
    HALF,
    LOG2E,
    Channel,
    OwnedTiles,
    Source,
    all_keys,
    head_start,
    make_barriers,
    make_program,
    mma_layout,
    produce,
    scores_of,
    seen_keys,
    skip,
    warpgroup_rows,
    warpgroup_zeros,
    weighted_exponentials,
    written_rows,
)
from longnet.attention.backends.triton.kernels.hopper_padding import (
    clear_of_padding,
    key_numbers,
    make_padding,
    padding_of_tile,
    without_padding,
)
from longnet.attention.backends.triton.kernels.triton_internals import aggregate


@gluon.jit
def _query_block(
    q, grad, zero, keys, values, acc, lse2, delta, weights, last, padding, padded, scale2, done,
    CUT: gl.constexpr, OPERAND: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """One block of keys, added to ``acc``."""
    # Of one matrix of scores.
    PRODUCTS: gl.constexpr = 2 if C.split_channels else 1
    keys.wait(done)
    next_s = scores_of(q, keys.tile(done), zero, C)
    values.wait(done)
    next_p = scores_of(grad, values.tile(done), zero, C)
    s = warpgroup_mma_wait(PRODUCTS, deps=(next_s,))
    p = weighted_exponentials(s, scale2, lse2, weights, C)
    if CUT:
        n = key_numbers(padding, padded, gl.SliceLayout(0, s.type.layout), C)
        if not C.PADDED:
            p = gl.where(n[None, :] <= last[:, None], p, 0.0)
    grad_p = warpgroup_mma_wait(0, deps=(next_p,))
    values.release(done)
    grad_s = p * (grad_p - delta[:, None])
    if CUT:
        if C.PADDED:
            # Not the probability: 0 times the NaN that a padded value may give is NaN.
            grad_s = gl.where(n[None, :] <= last[:, None], grad_s, 0.0)
    grad_s = gl.convert_layout(grad_s.to(keys.tiles.dtype), OPERAND)
    next_acc = warpgroup_mma(grad_s, keys.tile(done), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(next_acc,))
    keys.release(done)
    return acc


@gluon.jit
def _consume_keys(
    program, own, keys, values, padding, LSE, DELTA, GRAD_Q, lse_at, grad_q_at, scale, WHICH: gl.constexpr
):  # fmt: skip
    C: gl.constexpr = program.C
    scores: gl.constexpr = mma_layout(C.N)
    outs: gl.constexpr = mma_layout(C.D)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores)
    operand: gl.constexpr = gl.DotOperandLayout(0, outs, 2)
    zero = warpgroup_zeros(C.N)
    q, grad = own.parts(0, WHICH, C), own.parts(1, WHICH, C)
    scale2 = scale * LOG2E
    done, turn, upcoming = 0, 0, program.load_item(gl.program_id(0))
    for slot in range(gl.program_id(0), program.items, gl.num_programs(0)):
        block, upcoming = program.take(upcoming, slot)
        if block.first_row < block.count:
            own_first, m = warpgroup_rows(block, WHICH, row_layout)
            at = head_start(lse_at, block) + (block.origin + m * block.step).to(gl.int64) * lse_at[2]
            lse = gl.load(LSE + at, mask=m < block.count, other=float("-inf"))
            # A row without keys, or a dead one, has lse -inf and probabilities 0; a dead one's query may be anything.
            lse2 = gl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
            delta = gl.load(DELTA + at, mask=m < block.count, other=0.0)
            acc = warpgroup_zeros(C.D)
            own.wait(turn)
            turn += 1
            for index in range(0, program.ranges(block)):
                swept = program.swept(block, index, False)
                last, whole, top = all_keys(swept, row_layout, C)
                weights = program.weights(block, swept, C.period, gl.SliceLayout(0, scores))
                if C.CAUSAL:
                    if index == 0:
                        last, whole, top, all_top = seen_keys(block, swept, m, last, WHICH, C)
                        for _ in range(top, all_top):
                            skip(keys, values, done)
                            done += 1
                clear = gl.minimum(whole // C.N, top + 1)
                clear = clear_of_padding(padding, block, swept, clear, program.length, C)
                for i in range(0, top + 1 - clear):
                    padded = padding_of_tile(padding, block, swept, (top - i) * C.N, C)
                    acc = _query_block(
                        q, grad, zero, keys, values, acc, lse2, delta, weights, last - (top - i) * C.N, padding, padded,
                        scale2, done, True, operand, C,
                    )  # fmt: skip
                    done += 1
                for _ in range(0, clear):
                    acc = _query_block(
                        q, grad, zero, keys, values, acc, lse2, delta, weights, last, padding, 0, scale2, done,
                        False, operand, C,
                    )  # fmt: skip
                    done += 1
            own.release()

            at_out, ok = written_rows(grad_q_at, block, own_first, C, outs)
            nothing = gl.convert_layout(lse, gl.SliceLayout(1, outs)) == float("-inf")
            result = gl.where(nothing[:, None], 0.0, acc * scale)
            result = _merged(GRAD_Q + at_out, result, ok, C)
            gl.store(GRAD_Q + at_out, result.to(GRAD_Q.dtype.element_ty), mask=ok)


@gluon.jit
def _merged(rows, result, ok, C: gl.constexpr):
    """Gradients, added to those that earlier nests left if ``MERGE``."""
    if C.MERGE:
        result += gl.load(rows, mask=ok, other=0.0).to(gl.float32)
    return result


@gluon.jit
def _statistics(lse_rows, delta_rows, weights, inside):
    """(shift, delta) of a block of queries: what is added to a scaled score before the exponential, and delta."""
    lse = gl.load(lse_rows, mask=inside, other=float("-inf"))
    # A row without keys has lse -inf and probabilities 0.
    shift = gl.where(lse == float("-inf"), float("-inf"), weights - lse * LOG2E)
    return shift, gl.load(delta_rows, mask=inside, other=0.0)


@aggregate
class Statistics:
    """Where the threads of a warpgroup leave a block's shift and delta for one another, for two blocks in turn."""

    places: gl.shared_memory_descriptor

    @gluon.jit
    def store(self, done, shift, delta):
        self.places.index(done % 2 * 2).store(shift)
        self.places.index(done % 2 * 2 + 1).store(delta)

    @gluon.jit
    def shift(self, done, LAYOUT: gl.constexpr):
        return self.places.index(done % 2 * 2).load(LAYOUT)

    @gluon.jit
    def delta(self, done, LAYOUT: gl.constexpr):
        return self.places.index(done % 2 * 2 + 1).load(LAYOUT)


@gluon.jit
def key_block(
    k, v, zero, queries, grads, acc_k, acc_v, statistics, low, high, scale2, done,
    CUT: gl.constexpr, PENDING: gl.constexpr, OPERAND: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """One block of queries, added to ``acc_k`` and ``acc_v``, which are on their way when it returns.

    The products of the block before, where they are ``PENDING``, run until this one's scores follow them, so that matrix
    units have no gap from one block to the next.
    Queries from column ``low`` of a key's row up to column ``high``, of its own or of all rows, see the key, where ``CUT``.
    """
    column: gl.constexpr = gl.SliceLayout(0, zero.type.layout)
    # Of one matrix of scores.
    PRODUCTS: gl.constexpr = 2 if C.split_channels else 1
    queries.wait(done)
    next_s = scores_of(k, queries.tile(done), zero, C)
    if PENDING:
        acc_k, acc_v = warpgroup_mma_wait(PRODUCTS, deps=(acc_k, acc_v))
        queries.release(done - 1)
        grads.release(done - 1)
    grads.wait(done)
    next_p = scores_of(v, grads.tile(done), zero, C)
    shift = statistics.shift(done, column)
    s = warpgroup_mma_wait(PRODUCTS, deps=(next_s,))
    p = gl.exp2(s * scale2 + shift[None, :])
    if CUT:
        n = gl.arange(0, C.N, layout=column)
        if high.type.is_block():
            p = gl.where((n[None, :] >= low[:, None]) & (n[None, :] <= high[:, None]), p, 0.0)
        else:
            p = gl.where((n[None, :] >= low[:, None]) & (n <= high)[None, :], p, 0.0)
    p_half = gl.convert_layout(p.to(queries.tiles.dtype), OPERAND)
    acc_v = warpgroup_mma(p_half, grads.tile(done), acc_v, is_async=True)
    delta = statistics.delta(done, column)
    grad_p = warpgroup_mma_wait(1, deps=(next_p,))
    grad_s = gl.convert_layout((p * (grad_p - delta[None, :])).to(queries.tiles.dtype), OPERAND)
    acc_k = warpgroup_mma(grad_s, queries.tile(done), acc_k, is_async=True)
    return acc_k, acc_v


@gluon.jit
def _key_blocks(
    k, v, zero, queries, grads, acc_k, acc_v, statistics, lse_rows, delta_rows, back, weights, n, j, seen, count, scale2, done,
    COUNT: gl.constexpr, CUT: gl.constexpr, OPERAND: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """``COUNT`` blocks from row ``j`` down, whose products run into one another.

    Under each the statistics of the next are read, few by each thread.
    """
    for i in gl.static_range(COUNT):
        shift, delta = _statistics(lse_rows - (i + 1) * back, delta_rows - (i + 1) * back, weights, n < j - i * C.N)
        acc_k, acc_v = key_block(
            k, v, zero, queries, grads, acc_k, acc_v, statistics, seen - (j - i * C.N), count - 1 - (j - i * C.N), scale2,
            done + i, CUT, i > 0, OPERAND, C,
        )  # fmt: skip
        if i == COUNT - 1:
            acc_k, acc_v = warpgroup_mma_wait(0, deps=(acc_k, acc_v))
            queries.release(done + i)
            grads.release(done + i)
        statistics.store(done + i + 1, shift, delta)
    return acc_k, acc_v


@gluon.jit
def loaded(parts, LAYOUT: gl.constexpr):
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
    program, own, queries, grads, statistics, LSE, DELTA, GRAD_K, GRAD_V, PADDING,
    lse_at, grad_k_at, grad_v_at, padding_at, scale,
    WHICH: gl.constexpr,
):  # fmt: skip
    C: gl.constexpr = program.C
    RATE: gl.constexpr = C.NEST.dilation_rates[0]
    scores: gl.constexpr = mma_layout(C.N)
    outs: gl.constexpr = mma_layout(C.D)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores)
    operand: gl.constexpr = gl.DotOperandLayout(0, outs, 2)
    zero = warpgroup_zeros(C.N)
    linear: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    left: gl.constexpr = gl.DotOperandLayout(0, scores, 2)
    scale2 = scale * LOG2E
    done, turn, upcoming = 0, 0, program.load_item(gl.program_id(0))
    for slot in range(gl.program_id(0), program.items, gl.num_programs(0)):
        block, upcoming = program.take(upcoming, slot)
        if block.first_row < block.count:
            own_first, m = warpgroup_rows(block, WHICH, row_layout)
            head_at = head_start(lse_at, block)
            acc_k = warpgroup_zeros(C.D)
            acc_v = warpgroup_zeros(C.D)
            own.wait(turn)
            turn += 1
            k, v = own.parts(0, WHICH, C), own.parts(1, WHICH, C)
            if C.D == 64:
                k, v = loaded(k, left), loaded(v, left)
            # Times 1. Of a single range the compiler knows that there is no loop, arranges what follows differently, and has
            # no registers left for products under way (ptxas says C7511 and waits for each).
            ranges = program.ranges(block) * ((2 * program.items - slot - 1) // program.items)
            for index in range(0, ranges):
                swept = program.swept(block, index, True)
                blocks = gl.cdiv(swept.count, C.N)
                seen = gl.full([HALF], 0, gl.int32, layout=row_layout)
                # Blocks [clear, blocks) are seen whole but for a ragged last one, [own_low, clear) are cut by the diagonal.
                all_low, own_low, clear = 0, 0, 0
                if C.CAUSAL:
                    if index == 0:
                        ratio = block.step // RATE
                        first_seen = (block.origin - swept.first) // RATE + own_first * ratio
                        seen = (block.origin - swept.first) // RATE + m * ratio
                        all_low = ((block.origin - swept.first) // RATE + block.first_row * ratio) // C.N
                        own_low = gl.minimum(blocks, first_seen // C.N)
                        clear = gl.minimum(blocks, gl.cdiv(first_seen + (HALF - 1) * ratio, C.N))
                ragged = gl.minimum(blocks - clear, (blocks * C.N > swept.count).to(gl.int32))
                n = gl.arange(0, C.N, layout=linear)
                weights = gl.zeros(n.shape, gl.float32, layout=linear)
                if C.weighted:
                    weights = program.weights(block, swept, C.N, linear)
                at = head_at + gl.cast(swept.first, gl.int64) * lse_at[2]
                lse_step = gl.cast(swept.step, gl.int64) * lse_at[2]
                at += ((blocks - 1) * C.N + n).to(gl.int64) * lse_step
                row = (blocks - 1) * C.N + n
                # An empty range has no block at all.
                shift, delta = _statistics(LSE + at, DELTA + at, weights, (row >= 0) & (row < swept.count))
                statistics.store(done, shift, delta)
                j = (blocks - 1) * C.N
                whole = gl.maximum(blocks - clear - ragged, 0)
                # A ragged block, an odd one, pairs, and those that the diagonal cuts.
                trips = (ragged, whole % 2, whole // 2, blocks - own_low - ragged - whole)
                for part in gl.static_range(4):
                    for _ in range(0, trips[part]):
                        acc_k, acc_v = _key_blocks(
                            k, v, zero, queries, grads, acc_k, acc_v, statistics, LSE + at, DELTA + at, C.N * lse_step, weights,
                            n, j, seen, swept.count, scale2, done, BLOCKS_OF_PART[part], CUT_OF_PART[part], operand, C,
                        )  # fmt: skip
                        at -= BLOCKS_OF_PART[part] * C.N * lse_step
                        j -= BLOCKS_OF_PART[part] * C.N
                        done += BLOCKS_OF_PART[part]
                for _ in range(all_low, own_low):
                    skip(queries, grads, done)
                    done += 1
            own.release()

            k_at, ok = written_rows(grad_k_at, block, own_first, C, outs)
            v_at, ok = written_rows(grad_v_at, block, own_first, C, outs)
            acc_k *= scale
            if C.PADDED:
                token, there = block.origin + m * block.step, m < block.count
                acc_k = without_padding(acc_k, PADDING, padding_at, block.batch, token, there)
                acc_v = without_padding(acc_v, PADDING, padding_at, block.batch, token, there)
            result_k = _merged(GRAD_K + k_at, acc_k, ok, C)
            result_v = _merged(GRAD_V + v_at, acc_v, ok, C)
            gl.store(GRAD_K + k_at, result_k.to(GRAD_K.dtype.element_ty), mask=ok)
            gl.store(GRAD_V + v_at, result_v.to(GRAD_V.dtype.element_ty), mask=ok)


@gluon.jit
def hopper_query_kernel(
    LSE, DELTA, GRAD_Q, ORDER, OFFSETS, PADDING, COUNTS,
    q0, q1, q2, q3, q4, g0, g1, g2, g3, g4, k0, k1, k2, k3, k4, v0, v1, v2, v3, v4,
    q_fold, g_fold, k_fold, v_fold, lse_at, grad_q_at, padding_at,
    items, length, heads, group, scale, segments, segment_offset, C: gl.constexpr,
):  # fmt: skip
    """Gradients of the query rows of one nest, added to what earlier nests left if ``MERGE``."""
    q, g = Source((q0, q1, q2, q3, q4), q_fold), Source((g0, g1, g2, g3, g4), g_fold)
    k, v = Source((k0, k1, k2, k3, k4), k_fold), Source((v0, v1, v2, v3, v4), v_fold)
    own, keys, values = _shared_memory(q, g, k, v, C)
    first, second = make_padding(PADDING, COUNTS, padding_at, C), make_padding(PADDING, COUNTS, padding_at, C)
    fence_async_shared()
    program = make_program(ORDER, ORDER, OFFSETS, segment_offset, items, length, heads, group, segments, C)
    gl.warp_specialize(
        [
            (
                _consume_keys,
                (program, own, keys, values, first, LSE, DELTA, GRAD_Q, lse_at, grad_q_at, scale, 0),
            ),
            (
                _consume_keys,
                (program, own, keys, values, second, LSE, DELTA, GRAD_Q, lse_at, grad_q_at, scale, 1),
            ),
            (produce, (program, own, (q, g), keys, values, (k, v), False)),
        ],
        [4, 1],
        [232, 40],
    )


@gluon.jit
def _shared_memory(own_a, own_b, swept_a, swept_b, C: gl.constexpr):
    """(owned tiles, two channels) for copies of these."""
    own_a_smem = gl.allocate_shared_memory(own_a.views[0].dtype, [C.M, C.D], own_a.views[0].layout)
    own_b_smem = gl.allocate_shared_memory(own_b.views[0].dtype, [C.M, C.D], own_b.views[0].layout)
    a_smem = gl.allocate_shared_memory(swept_a.views[0].dtype, [C.STAGES, C.N, C.D], swept_a.views[0].layout)
    b_smem = gl.allocate_shared_memory(swept_b.views[0].dtype, [C.STAGES, C.N, C.D], swept_b.views[0].layout)
    own = OwnedTiles((own_a_smem, own_b_smem), make_barriers(1, 1), make_barriers(1, 2))
    first = Channel(a_smem, make_barriers(C.STAGES, 1), make_barriers(C.STAGES, 2))
    second = Channel(b_smem, make_barriers(C.STAGES, 1), make_barriers(C.STAGES, 2))
    return own, first, second


@gluon.jit
def hopper_key_value_kernel(
    LSE, DELTA, GRAD_K, GRAD_V, ORDER, LIMITS, OFFSETS, PADDING,
    q0, q1, q2, q3, q4, g0, g1, g2, g3, g4, k0, k1, k2, k3, k4, v0, v1, v2, v3, v4,
    q_fold, g_fold, k_fold, v_fold, lse_at, grad_k_at, grad_v_at, padding_at,
    items, length, heads, group, scale, segments, segment_offset, C: gl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values of one nest by query head, added to what earlier nests left if ``MERGE``.

    Where ``LIMITED``, from the queries before LIMITS (heads, branches) alone.
    """
    q, g = Source((q0, q1, q2, q3, q4), q_fold), Source((g0, g1, g2, g3, g4), g_fold)
    k, v = Source((k0, k1, k2, k3, k4), k_fold), Source((v0, v1, v2, v3, v4), v_fold)
    own, queries, grads = _shared_memory(k, v, q, g, C)
    fence_async_shared()
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    first = Statistics(gl.allocate_shared_memory(gl.float32, [4, C.N], plain))
    second = Statistics(gl.allocate_shared_memory(gl.float32, [4, C.N], plain))
    program = make_program(ORDER, LIMITS, OFFSETS, segment_offset, items, length, heads, group, segments, C)
    gl.warp_specialize(
        [
            (
                _consume_queries,
                (
                    program, own, queries, grads, first, LSE, DELTA, GRAD_K, GRAD_V, PADDING,
                    lse_at, grad_k_at, grad_v_at, padding_at, scale, 0,
                ),
            ),
            (
                _consume_queries,
                (
                    program, own, queries, grads, second, LSE, DELTA, GRAD_K, GRAD_V, PADDING,
                    lse_at, grad_k_at, grad_v_at, padding_at, scale, 1,
                ),
            ),
            (produce, (program, own, (k, v), queries, grads, (q, g), True)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
