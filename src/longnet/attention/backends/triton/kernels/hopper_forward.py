"""The forward kernel for Hopper GPUs, in Gluon. The mathematics of :mod:`longnet.attention.backends.triton.kernels.forward`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from longnet.attention.backends.triton.kernels.hopper import (
    HALF,
    LN2,
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
)


@gluon.jit
def _softmax(s, row_max, row_sum, weights, last, padding, padded, scale2, CUT: gl.constexpr, C: gl.constexpr):
    """(p, rescale, row max, row sum) of one block of scores; ``CUT`` where some row may not see all of its keys."""
    if CUT:
        n = key_numbers(padding, padded, gl.SliceLayout(0, s.type.layout), C)
        s = gl.where(n[None, :] <= last[:, None], s, float("-inf"))
    new = gl.maximum(row_max, gl.max(s, 1) * scale2)
    base = new
    if CUT:
        # A row that has seen no key yet subtracts 0: exp2(-inf - -inf) would be NaN.
        base = gl.where(new == float("-inf"), 0.0, new)
    p = weighted_exponentials(s, scale2, base, weights, C)
    rescale = gl.exp2(row_max - base)
    return p, rescale, new, row_sum * rescale + gl.sum(p, 1)


@gluon.jit
def _advance(
    q, zero, keys, values, acc, p, row_max, row_sum, weights, last, padding, padded, scale2, done,
    CUT: gl.constexpr, OPERAND: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """One block of keys; the product of the block before with its values runs under this one's weighted_exponentials."""
    keys.wait(done)
    next_s = scores_of(q, keys.tile(done), zero, C)
    values.wait(done - 1)
    next_acc = warpgroup_mma(p, values.tile(done - 1), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(next_s,))
    keys.release(done)
    p_new, rescale, row_max, row_sum = _softmax(s, row_max, row_sum, weights, last, padding, padded, scale2, CUT, C)
    acc = warpgroup_mma_wait(0, deps=(next_acc,))
    values.release(done - 1)
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, acc.type.layout))[:, None]
    return acc, gl.convert_layout(p_new.to(p.dtype), OPERAND), row_max, row_sum


@gluon.jit
def _consume(program, own, keys, values, padding, OUT, LSE, out_at, lse_at, scale, WHICH: gl.constexpr):
    C: gl.constexpr = program.C
    scores: gl.constexpr = mma_layout(C.N)
    outs: gl.constexpr = mma_layout(C.D)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores)
    out_rows: gl.constexpr = gl.SliceLayout(1, outs)
    operand: gl.constexpr = gl.DotOperandLayout(0, outs, 2)
    zero = warpgroup_zeros(C.N)
    q = own.parts(0, WHICH, C)
    scale2 = scale * LOG2E
    done, turn, upcoming = 0, 0, program.load_item(gl.program_id(0))
    for slot in range(gl.program_id(0), program.items, gl.num_programs(0)):
        block, upcoming = program.take(upcoming, slot)
        if block.first_row < block.count:
            own_first, m = warpgroup_rows(block, WHICH, row_layout)
            row_max = gl.full([HALF], float("-inf"), gl.float32, layout=row_layout)
            row_sum = gl.zeros([HALF], gl.float32, layout=row_layout)
            acc = warpgroup_zeros(C.D)
            p = gl.zeros(zero.shape, keys.tiles.dtype, layout=operand)
            own.wait(turn)
            turn += 1
            for index in range(0, program.ranges(block)):
                swept = program.swept(block, index, False)
                last, whole, top = all_keys(swept, row_layout, C)
                weights = program.weights(block, swept, C.period, gl.SliceLayout(0, scores))
                if index == 0:
                    all_top = top
                    if C.CAUSAL:
                        last, whole, top, all_top = seen_keys(block, swept, m, last, WHICH, C)
                    for _ in range(top, all_top):
                        skip(keys, values, done)
                        done += 1
                    # The first block by itself: nothing runs under its weighted_exponentials yet.
                    padded = padding_of_tile(padding, block, swept, top * C.N, C)
                    keys.wait(done)
                    first = scores_of(q, keys.tile(done), zero, C)
                    scored = warpgroup_mma_wait(0, deps=(first,))
                    keys.release(done)
                    done += 1
                    first_p, rescale, row_max, row_sum = _softmax(
                        scored, row_max, row_sum, weights, last - top * C.N, padding, padded, scale2, True, C
                    )
                    p = gl.convert_layout(first_p.to(p.dtype), operand)
                    top -= 1
                clear = gl.minimum(whole // C.N, top + 1)
                clear = clear_of_padding(padding, block, swept, clear, program.length, C)
                for i in range(0, top + 1 - clear):
                    padded = padding_of_tile(padding, block, swept, (top - i) * C.N, C)
                    acc, p, row_max, row_sum = _advance(
                        q, zero, keys, values, acc, p, row_max, row_sum, weights, last - (top - i) * C.N, padding, padded,
                        scale2, done, True, operand, C,
                    )  # fmt: skip
                    done += 1
                for _ in range(0, clear):
                    acc, p, row_max, row_sum = _advance(
                        q, zero, keys, values, acc, p, row_max, row_sum, weights, last, padding, 0, scale2, done,
                        False, operand, C,
                    )  # fmt: skip
                    done += 1
            own.release()
            values.wait(done - 1)
            last_acc = warpgroup_mma(p, values.tile(done - 1), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(last_acc,))
            values.release(done - 1)

            row = block.origin + m * block.step
            row_ok = m < block.count
            lse = row_max * LN2 + gl.log(row_sum)
            lse_rows = LSE + head_start(lse_at, block) + row.to(gl.int64) * lse_at[2]
            if C.PADDED:
                # The lse of a row without keys is -inf by now, and its sum 0.
                row_sum = gl.where(row_sum == 0.0, 1.0, row_sum)
            weight = 1.0 / row_sum
            if C.MERGE:
                earlier = gl.load(lse_rows, mask=row_ok, other=float("-inf"))
                top = gl.maximum(earlier, lse)
                if C.PADDED:
                    top = gl.where(top == float("-inf"), 0.0, top)
                ours, theirs = gl.exp(lse - top), gl.exp(earlier - top)
                both = ours + theirs
                if C.PADDED:
                    none = both == 0.0
                    both = gl.where(none, 1.0, both)
                weight = weight * (ours / both)
                earlier_weight = gl.convert_layout(theirs / both, out_rows)
                lse = top + gl.log(both)
                if C.PADDED:
                    lse = gl.where(none, float("-inf"), lse)
            out = acc * gl.convert_layout(weight, out_rows)[:, None]
            at, ok = written_rows(out_at, block, own_first, C, outs)
            if C.MERGE:
                out += earlier_weight[:, None] * gl.load(OUT + at, mask=ok, other=0.0).to(gl.float32)
            gl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=ok)
            gl.store(lse_rows, lse, mask=row_ok)


@gluon.jit
def hopper_forward_kernel(
    OUT, LSE, ORDER, OFFSETS, PADDING, COUNTS,
    q0, q1, q2, q3, q4, k0, k1, k2, k3, k4, v0, v1, v2, v3, v4,
    q_fold, k_fold, v_fold, out_at, lse_at, padding_at,
    items, length, heads, group, scale, segments, segment_offset, C: gl.constexpr,
):  # fmt: skip
    """Query rows of one nest, ``M`` at a time: out and lse, mixed into what earlier nests left if ``MERGE``."""
    q_smem = gl.allocate_shared_memory(q0.dtype, [C.M, C.D], q0.layout)
    k_smem = gl.allocate_shared_memory(k0.dtype, [C.STAGES, C.N, C.D], k0.layout)
    v_smem = gl.allocate_shared_memory(v0.dtype, [C.STAGES, C.N, C.D], v0.layout)
    own = OwnedTiles((q_smem,), make_barriers(1, 1), make_barriers(1, 2))
    keys = Channel(k_smem, make_barriers(C.STAGES, 1), make_barriers(C.STAGES, 2))
    values = Channel(v_smem, make_barriers(C.STAGES, 1), make_barriers(C.STAGES, 2))
    first, second = make_padding(PADDING, COUNTS, padding_at, C), make_padding(PADDING, COUNTS, padding_at, C)
    fence_async_shared()
    program = make_program(ORDER, ORDER, OFFSETS, segment_offset, items, length, heads, group, segments, C)
    q = Source((q0, q1, q2, q3, q4), q_fold)
    k, v = Source((k0, k1, k2, k3, k4), k_fold), Source((v0, v1, v2, v3, v4), v_fold)
    gl.warp_specialize(
        [
            (_consume, (program, own, keys, values, first, OUT, LSE, out_at, lse_at, scale, 0)),
            (_consume, (program, own, keys, values, second, OUT, LSE, out_at, lse_at, scale, 1)),
            (produce, (program, own, (q,), keys, values, (k, v), False)),
        ],
        [4, 1],
        [240, 24],
    )
