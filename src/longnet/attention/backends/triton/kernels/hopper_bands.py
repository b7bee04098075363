"""Windows and strided keys on Hopper GPUs, in Gluon. The mathematics of :mod:`longnet.attention.backends.triton.kernels.bands`.

The programs are those of :mod:`longnet.attention.backends.triton.kernels.hopper`: one warp copies, two warpgroups compute.
Queries are all positions. The keys of a band are numbered along the grid; chosen keys of one token lie at equal steps, so a
tile is one copy, and of blocks a tile is a copy for each block. Constants ``C``: ``hopper_bands.BandConstants``.
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

from longnet.attention.backends.triton.kernels.bands import (
    end_of_keys,
    end_of_queries,
    first_key,
    first_query,
    number_at,
    offset_in,
    origin_of,
    position_of,
)
from longnet.attention.backends.triton.kernels.hopper import (
    HALF,
    LN2,
    LOG2E,
    Channel,
    OwnedTiles,
    Source,
    copy_tile,
    head_start,
    make_barriers,
    mma_layout,
    scores_of,
    warpgroup_rows,
    warpgroup_zeros,
    written_rows,
)
from longnet.attention.backends.triton.kernels.hopper_backward import Statistics
from longnet.attention.backends.triton.kernels.rows import OwnedRows
from longnet.attention.backends.triton.kernels.triton_internals import aggregate


@aggregate
class Bands:
    """What all warps of a program know of the launch. It has the fields of ``bands.BandSizes`` that band functions read."""

    items: gl.base_value
    length: gl.base_value
    heads: gl.base_value
    group: gl.base_value
    tiles: gl.base_value
    segment_offset: gl.base_value
    C: gl.constexpr

    @gluon.jit
    def block(self, slot):
        """The positions of a slot's item: queries, or numbers of keys from the first on."""
        if self.C.LONGEST_FIRST:
            pairs = self.items // self.tiles
            tile, pair = slot // pairs, slot % pairs
        else:
            tile, pair = slot % self.tiles, slot // self.tiles
        if self.C.LAST_FIRST:
            tile = self.tiles - 1 - tile
        batch, head = pair // self.heads, pair % self.heads
        return OwnedRows(batch, head, 0, self.length, 1, 0, 1, tile * self.C.M, self.length)

    @gluon.jit
    def grid(self, block, i: gl.constexpr):
        """(where token 0 stands on a band's grid, the head's offset in it)."""
        return origin_of(0, block.batch, i, self, self.C), offset_in(block.head, i, self, self.C)

    @gluon.jit
    def keys_of(self, position, origin, offset, i: gl.constexpr):
        """(number of the first key that a query reads in a band, number after its last)."""
        low = number_at(first_key(position, origin, i, self.C), origin, offset, i, self.C)
        return low, number_at(end_of_keys(position, origin, self, i, self.C), origin, offset, i, self.C)

    @gluon.jit
    def swept_keys(self, block, origin, offset, i: gl.constexpr):
        """(number of the first key of the first tile that a block of queries reads, number after the last, tiles)."""
        last = gl.minimum(block.first_row + self.C.M, self.length) - 1
        begin, _ = self.keys_of(block.first_row, origin, offset, i)
        _, end = self.keys_of(last, origin, offset, i)
        if self.C.BLOCKS[i] > 1:
            begin = begin // self.C.BLOCKS[i] * self.C.BLOCKS[i]
        tiles = gl.cdiv(gl.maximum(end - begin, 0), self.C.N)
        if i == 0:
            # The first product of a program's rows has nothing before it.
            tiles = gl.maximum(tiles, 1)
        return begin, end, tiles


@gluon.jit
def _copy_rows(source, batch, head, first, barrier, target, i: gl.constexpr, RATE: gl.constexpr):
    """Start copying rows ``first``, ``first + RATE``, ... of a head by a band's view."""
    flat = batch * source.fold[0] + head * source.fold[1] + first
    column = flat % RATE * source.fold[3] + head * source.fold[2]
    copy_tile(source.views[i], [flat // RATE, column], barrier, target)


@gluon.jit
def _copy_keys(
    source, batch, head, number, origin, offset, barrier, target, ROWS: gl.constexpr, i: gl.constexpr, C: gl.constexpr
):
    """Start copying ``ROWS`` keys of a band from a number on; where keys are blocks the number begins one."""
    if C.BLOCKS[i] == 1:
        first = position_of(number, origin, offset, i, C)
        _copy_rows(source, batch, head, first, barrier, target, i, C.RATES[i])
    else:
        UNIT: gl.constexpr = C.BLOCKS[i] if C.BLOCKS[i] < ROWS else ROWS
        for part in gl.static_range(ROWS // UNIT):
            first = position_of(number + part * UNIT, origin, offset, i, C)
            _copy_rows(source, batch, head, first, barrier, target.slice(part * UNIT, UNIT), i, 1)


@gluon.jit
def _fill(channel, done, source, batch, head, number, origin, offset, i: gl.constexpr, C: gl.constexpr):
    """One tile of keys or values on its way."""
    STAGES: gl.constexpr = channel.tiles.shape[0]
    stage = done % STAGES
    mbarrier.wait(channel.empty.index(stage), ((done // STAGES) & 1) ^ 1)
    mbarrier.expect(channel.full.index(stage), C.N * C.D * 2)
    _copy_keys(
        source, batch, head, number, origin, offset, channel.full.index(stage), channel.tiles.index(stage), C.N, i, C
    )


@gluon.jit
def _produce_keys(bands, own, own_sources, keys, values, k, v):
    """What the copying warp does where queries are owned."""
    C: gl.constexpr = bands.C
    done, turn = 0, 0
    for slot in range(gl.program_id(0), bands.items, gl.num_programs(0)):
        block = bands.block(slot)
        own.fill(turn, own_sources, block.head, block, (1,))
        turn = turn + 1
        kv_head = block.head // bands.group
        for i in gl.static_range(len(C.RATES)):
            origin, offset = bands.grid(block, i)
            begin, _, tiles = bands.swept_keys(block, origin, offset, i)
            for t in range(0, tiles):
                number = begin + t * C.N
                _fill(keys, done, k, block.batch, kv_head, number, origin, offset, i, C)
                _fill(values, done, v, block.batch, kv_head, number, origin, offset, i, C)
                done += 1


@gluon.jit
def _parts(begin, end, tiles, low_last, high_first, C: gl.constexpr):
    """How many tiles some row sees in part, then all rows whole, then some in part."""
    before = gl.minimum(gl.cdiv(gl.maximum(low_last - begin, 0), C.N), tiles)
    whole = gl.maximum(gl.minimum(high_first, end) - begin - before * C.N, 0) // C.N
    whole = gl.minimum(whole, tiles - before)
    return before, whole, tiles - before - whole


@gluon.jit
def _seen(s, j, low, high, C: gl.constexpr):
    """Which of a tile's keys, from number ``j`` on, each row reads: shaped like the scores ``s`` (64, N)."""
    number = j + gl.arange(0, C.N, layout=gl.SliceLayout(0, s.type.layout))
    return (number[None, :] >= low[:, None]) & (number[None, :] < high[:, None])


@gluon.jit
def _softmax(s, row_max, row_sum, j, low, high, scale2, CUT: gl.constexpr, C: gl.constexpr):
    """(p, rescale, row max, row sum) of one tile of scores."""
    if CUT:
        s = gl.where(_seen(s, j, low, high, C), s, float("-inf"))
    new = gl.maximum(row_max, gl.max(s, 1) * scale2)
    base = new
    if CUT:
        # A row that has seen no key yet subtracts 0: exp2(-inf - -inf) would be NaN.
        base = gl.where(new == float("-inf"), 0.0, new)
    p = gl.exp2(s * scale2 - base[:, None])
    rescale = gl.exp2(row_max - base)
    return p, rescale, new, row_sum * rescale + gl.sum(p, 1)


@gluon.jit
def _advance(
    q, zero, keys, values, acc, p, row_max, row_sum, j, low, high, scale2, done,
    CUT: gl.constexpr, OPERAND: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """One tile of keys; the product of the tile before with its values runs under this one's exponentials."""
    keys.wait(done)
    next_s = scores_of(q, keys.tile(done), zero, C)
    values.wait(done - 1)
    next_acc = warpgroup_mma(p, values.tile(done - 1), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(next_s,))
    keys.release(done)
    p_new, rescale, row_max, row_sum = _softmax(s, row_max, row_sum, j, low, high, scale2, CUT, C)
    acc = warpgroup_mma_wait(0, deps=(next_acc,))
    values.release(done - 1)
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, acc.type.layout))[:, None]
    return acc, gl.convert_layout(p_new.to(p.dtype), OPERAND), row_max, row_sum


# Of the parts of a band: whether some row may not see all of its tiles.
CUT_OF_PART = gl.constexpr((True, False, True))


@gluon.jit
def _forward(bands, own, keys, values, OUT, LSE, out_at, lse_at, scale, WHICH: gl.constexpr):
    C: gl.constexpr = bands.C
    scores: gl.constexpr = mma_layout(C.N)
    outs: gl.constexpr = mma_layout(C.D)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores)
    out_rows: gl.constexpr = gl.SliceLayout(1, outs)
    operand: gl.constexpr = gl.DotOperandLayout(0, outs, 2)
    zero = warpgroup_zeros(C.N)
    q = own.parts(0, WHICH, C)
    scale2 = scale * LOG2E
    done, turn = 0, 0
    for slot in range(gl.program_id(0), bands.items, gl.num_programs(0)):
        block = bands.block(slot)
        own_first, m = warpgroup_rows(block, WHICH, row_layout)
        at = gl.minimum(m, bands.length - 1)
        first, last = gl.minimum(own_first, bands.length - 1), gl.minimum(own_first + HALF, bands.length) - 1
        row_max = gl.full([HALF], float("-inf"), gl.float32, layout=row_layout)
        row_sum = gl.zeros([HALF], gl.float32, layout=row_layout)
        acc = warpgroup_zeros(C.D)
        p = gl.zeros(zero.shape, keys.tiles.dtype, layout=operand)
        own.wait(turn)
        turn = turn + 1
        for i in gl.static_range(len(C.RATES)):
            origin, offset = bands.grid(block, i)
            begin, end, tiles = bands.swept_keys(block, origin, offset, i)
            low, high = bands.keys_of(at, origin, offset, i)
            low_last, _ = bands.keys_of(last, origin, offset, i)
            _, high_first = bands.keys_of(first, origin, offset, i)
            before, whole, after = _parts(begin, end, tiles, low_last, high_first, C)
            j = begin
            if i == 0:
                # The first tile by itself: nothing runs under its exponentials yet.
                keys.wait(done)
                begun = scores_of(q, keys.tile(done), zero, C)
                scored = warpgroup_mma_wait(0, deps=(begun,))
                keys.release(done)
                done += 1
                first_p, rescale, row_max, row_sum = _softmax(scored, row_max, row_sum, j, low, high, scale2, True, C)
                p = gl.convert_layout(first_p.to(p.dtype), operand)
                j += C.N
                whole -= (before == 0).to(gl.int32) * (whole > 0).to(gl.int32)
                after = tiles - gl.maximum(before, 1) - whole
                before = gl.maximum(before, 1) - 1
            counts = (before, whole, after)
            for part in gl.static_range(3):
                for _ in range(0, counts[part]):
                    acc, p, row_max, row_sum = _advance(
                        q,
                        zero,
                        keys,
                        values,
                        acc,
                        p,
                        row_max,
                        row_sum,
                        j,
                        low,
                        high,
                        scale2,
                        done,
                        CUT_OF_PART[part],
                        operand,
                        C,
                    )
                    done += 1
                    j += C.N
        own.release()
        values.wait(done - 1)
        last_acc = warpgroup_mma(p, values.tile(done - 1), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(last_acc,))
        values.release(done - 1)

        row_ok = m < bands.length
        some = row_sum != 0.0
        lse = gl.where(some, row_max * LN2 + gl.log(gl.where(some, row_sum, 1.0)), float("-inf"))
        weight = 1.0 / gl.where(some, row_sum, 1.0)
        lse_rows = LSE + head_start(lse_at, block) + m.to(gl.int64) * lse_at[2]
        if C.MERGE:
            earlier = gl.load(lse_rows, mask=row_ok, other=float("-inf"))
            top = gl.maximum(earlier, lse)
            top = gl.where(top == float("-inf"), 0.0, top)
            ours, theirs = gl.exp(lse - top), gl.exp(earlier - top)
            both = ours + theirs
            total = gl.where(both == 0.0, 1.0, both)
            weight = weight * (ours / total)
            earlier_weight = gl.convert_layout(theirs / total, out_rows)
            lse = gl.where(both == 0.0, float("-inf"), top + gl.log(total))
        out = acc * gl.convert_layout(weight, out_rows)[:, None]
        where, ok = written_rows(out_at, block, own_first, C, outs)
        if C.MERGE:
            out += earlier_weight[:, None] * gl.load(OUT + where, mask=ok, other=0.0).to(gl.float32)
        gl.store(OUT + where, out.to(OUT.dtype.element_ty), mask=ok)
        gl.store(lse_rows, lse, mask=row_ok)


@gluon.jit
def hopper_band_forward_kernel(
    OUT, LSE,
    q0, q1, q2, q3, q4, k0, k1, k2, k3, k4, v0, v1, v2, v3, v4,
    q_fold, k_fold, v_fold, out_at, lse_at,
    items, length, heads, group, tiles, segment_offset, scale, C: gl.constexpr,
):  # fmt: skip
    """``M`` queries over all bands: out and lse, mixed into what earlier launches left if ``MERGE``."""
    q_smem = gl.allocate_shared_memory(q0.dtype, [C.M, C.D], q0.layout)
    k_smem = gl.allocate_shared_memory(k0.dtype, [C.STAGES, C.N, C.D], k0.layout)
    v_smem = gl.allocate_shared_memory(v0.dtype, [C.STAGES, C.N, C.D], v0.layout)
    own = OwnedTiles((q_smem,), make_barriers(1, 1), make_barriers(1, 2))
    keys = Channel(k_smem, make_barriers(C.STAGES, 1), make_barriers(C.STAGES, 2))
    values = Channel(v_smem, make_barriers(C.STAGES, 1), make_barriers(C.STAGES, 2))
    fence_async_shared()
    bands = Bands(items, length, heads, group, tiles, segment_offset, C)
    q = Source((q0, q1, q2, q3, q4), q_fold)
    k, v = Source((k0, k1, k2, k3, k4), k_fold), Source((v0, v1, v2, v3, v4), v_fold)
    gl.warp_specialize(
        [
            (_forward, (bands, own, keys, values, OUT, LSE, out_at, lse_at, scale, 0)),
            (_forward, (bands, own, keys, values, OUT, LSE, out_at, lse_at, scale, 1)),
            (_produce_keys, (bands, own, (q,), keys, values, k, v)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _query_tile(
    q, grad, zero, keys, values, acc, lse2, delta, j, low, high, scale2, done,
    CUT: gl.constexpr, OPERAND: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """One tile of keys, added to the gradient of the queries."""
    # Of one matrix of scores.
    PRODUCTS: gl.constexpr = 2 if C.split_channels else 1
    keys.wait(done)
    next_s = scores_of(q, keys.tile(done), zero, C)
    values.wait(done)
    next_p = scores_of(grad, values.tile(done), zero, C)
    s = warpgroup_mma_wait(PRODUCTS, deps=(next_s,))
    p = gl.exp2(s * scale2 - lse2[:, None])
    if CUT:
        p = gl.where(_seen(s, j, low, high, C), p, 0.0)
    grad_p = warpgroup_mma_wait(0, deps=(next_p,))
    values.release(done)
    grad_s = p * (grad_p - delta[:, None])
    grad_s = gl.convert_layout(grad_s.to(keys.tiles.dtype), OPERAND)
    next_acc = warpgroup_mma(grad_s, keys.tile(done), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(next_acc,))
    keys.release(done)
    return acc


@gluon.jit
def _query_gradients(bands, own, keys, values, LSE, DELTA, GRAD_Q, lse_at, grad_q_at, scale, WHICH: gl.constexpr):
    C: gl.constexpr = bands.C
    scores: gl.constexpr = mma_layout(C.N)
    outs: gl.constexpr = mma_layout(C.D)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores)
    operand: gl.constexpr = gl.DotOperandLayout(0, outs, 2)
    zero = warpgroup_zeros(C.N)
    q, grad = own.parts(0, WHICH, C), own.parts(1, WHICH, C)
    scale2 = scale * LOG2E
    done, turn = 0, 0
    for slot in range(gl.program_id(0), bands.items, gl.num_programs(0)):
        block = bands.block(slot)
        own_first, m = warpgroup_rows(block, WHICH, row_layout)
        at = gl.minimum(m, bands.length - 1)
        first, last = gl.minimum(own_first, bands.length - 1), gl.minimum(own_first + HALF, bands.length) - 1
        rows = head_start(lse_at, block) + m.to(gl.int64) * lse_at[2]
        lse = gl.load(LSE + rows, mask=m < bands.length, other=float("-inf"))
        # A row without keys, or a dead one, has lse -inf and probabilities 0; a dead one's query may be anything.
        lse2 = gl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
        delta = gl.load(DELTA + rows, mask=m < bands.length, other=0.0)
        acc = warpgroup_zeros(C.D)
        own.wait(turn)
        turn = turn + 1
        for i in gl.static_range(len(C.RATES)):
            origin, offset = bands.grid(block, i)
            begin, end, tiles = bands.swept_keys(block, origin, offset, i)
            low, high = bands.keys_of(at, origin, offset, i)
            low_last, _ = bands.keys_of(last, origin, offset, i)
            _, high_first = bands.keys_of(first, origin, offset, i)
            counts = _parts(begin, end, tiles, low_last, high_first, C)
            j = begin
            for part in gl.static_range(3):
                for _ in range(0, counts[part]):
                    acc = _query_tile(
                        q,
                        grad,
                        zero,
                        keys,
                        values,
                        acc,
                        lse2,
                        delta,
                        j,
                        low,
                        high,
                        scale2,
                        done,
                        CUT_OF_PART[part],
                        operand,
                        C,
                    )
                    done += 1
                    j += C.N
        own.release()

        where, ok = written_rows(grad_q_at, block, own_first, C, outs)
        nothing = gl.convert_layout(lse, gl.SliceLayout(1, outs)) == float("-inf")
        result = gl.where(nothing[:, None], 0.0, acc * scale)
        if C.MERGE:
            result += gl.load(GRAD_Q + where, mask=ok, other=0.0).to(gl.float32)
        gl.store(GRAD_Q + where, result.to(GRAD_Q.dtype.element_ty), mask=ok)


@gluon.jit
def _shared_memory(own_a, own_b, swept_a, swept_b, C: gl.constexpr):
    """(owned tiles, two channels) for copies of these descriptors."""
    own_a_smem = gl.allocate_shared_memory(own_a.dtype, [C.M, C.D], own_a.layout)
    own_b_smem = gl.allocate_shared_memory(own_b.dtype, [C.M, C.D], own_b.layout)
    a_smem = gl.allocate_shared_memory(swept_a.dtype, [C.STAGES, C.N, C.D], swept_a.layout)
    b_smem = gl.allocate_shared_memory(swept_b.dtype, [C.STAGES, C.N, C.D], swept_b.layout)
    own = OwnedTiles((own_a_smem, own_b_smem), make_barriers(1, 1), make_barriers(1, 2))
    first = Channel(a_smem, make_barriers(C.STAGES, 1), make_barriers(C.STAGES, 2))
    second = Channel(b_smem, make_barriers(C.STAGES, 1), make_barriers(C.STAGES, 2))
    return own, first, second


@gluon.jit
def hopper_band_query_kernel(
    LSE, DELTA, GRAD_Q,
    q0, q1, q2, q3, q4, g0, g1, g2, g3, g4, k0, k1, k2, k3, k4, v0, v1, v2, v3, v4,
    q_fold, g_fold, k_fold, v_fold, lse_at, grad_q_at,
    items, length, heads, group, tiles, segment_offset, scale, C: gl.constexpr,
):  # fmt: skip
    """Gradients of ``M`` queries over all bands, added to what earlier launches left if ``MERGE``."""
    own, keys, values = _shared_memory(q0, g0, k0, v0, C)
    fence_async_shared()
    bands = Bands(items, length, heads, group, tiles, segment_offset, C)
    q, g = Source((q0, q1, q2, q3, q4), q_fold), Source((g0, g1, g2, g3, g4), g_fold)
    k, v = Source((k0, k1, k2, k3, k4), k_fold), Source((v0, v1, v2, v3, v4), v_fold)
    gl.warp_specialize(
        [
            (_query_gradients, (bands, own, keys, values, LSE, DELTA, GRAD_Q, lse_at, grad_q_at, scale, 0)),
            (_query_gradients, (bands, own, keys, values, LSE, DELTA, GRAD_Q, lse_at, grad_q_at, scale, 1)),
            (_produce_keys, (bands, own, (q, g), keys, values, k, v)),
        ],
        [4, 1],
        [232, 40],
    )


@gluon.jit
def _own_keys(bands, block):
    """(origin, offset, number of the block's first key, number after the head's last) of band 0."""
    C: gl.constexpr = bands.C
    origin, offset = bands.grid(block, 0)
    first = number_at(block.first_row * 0, origin, offset, 0, C)
    if C.BLOCKS[0] > 1:
        first = first // C.BLOCKS[0] * C.BLOCKS[0]
    end = number_at(block.size, origin, offset, 0, C)
    return origin, offset, first + block.first_row, end


@gluon.jit
def _swept_queries(bands, number, end, origin, offset, ROWS: gl.constexpr):
    """(the first query that reads one of ``ROWS`` keys from a number on, the query after the last)."""
    C: gl.constexpr = bands.C
    first = gl.maximum(position_of(number, origin, offset, 0, C), 0)
    last = gl.maximum(position_of(gl.minimum(number + ROWS, end) - 1, origin, offset, 0, C), 0)
    return first_query(first, origin, 0, C), end_of_queries(last, origin, bands, 0, C)


@gluon.jit
def _produce_queries(bands, own, own_sources, queries, grads, q, g):
    """What the copying warp does where keys are owned."""
    C: gl.constexpr = bands.C
    done, turn = 0, 0
    for slot in range(gl.program_id(0), bands.items, gl.num_programs(0)):
        block = bands.block(slot)
        origin, offset, number, end = _own_keys(bands, block)
        if number < end:
            mbarrier.wait(own.empty.index(0), (turn & 1) ^ 1)
            mbarrier.expect(own.full.index(0), 2 * C.M * C.D * 2)
            kv_head = block.head // bands.group
            for one in gl.static_range(2):
                _copy_keys(
                    own_sources[one],
                    block.batch,
                    kv_head,
                    number,
                    origin,
                    offset,
                    own.full.index(0),
                    own.tiles[one],
                    C.M,
                    0,
                    C,
                )
            turn += 1
            begin, stop = _swept_queries(bands, number, end, origin, offset, C.M)
            for t in range(0, gl.cdiv(gl.maximum(stop - begin, 0), C.N)):
                row = begin + t * C.N
                _fill_queries(queries, done, q, block, row, C)
                _fill_queries(grads, done, g, block, row, C)
                done += 1


@gluon.jit
def _fill_queries(channel, done, source, block, row, C: gl.constexpr):
    STAGES: gl.constexpr = channel.tiles.shape[0]
    stage = done % STAGES
    mbarrier.wait(channel.empty.index(stage), ((done // STAGES) & 1) ^ 1)
    mbarrier.expect(channel.full.index(stage), C.N * C.D * 2)
    source.copy(block.batch, block.head, row, 1, 0, channel.full.index(stage), channel.tiles.index(stage), (1,))


@gluon.jit
def _read_statistics(lse_rows, delta_rows, inside):
    """(shift, delta) of a block of queries: what is added to a scaled score before the exponential, and delta."""
    lse = gl.load(lse_rows, mask=inside, other=float("-inf"))
    # A row without keys has lse -inf and probabilities 0.
    shift = gl.where(lse == float("-inf"), float("-inf"), lse * -LOG2E)
    return shift, gl.load(delta_rows, mask=inside, other=0.0)


@gluon.jit
def _key_tile(
    k, v, zero, queries, grads, acc_k, acc_v, statistics, row, first, end, scale2, done,
    CUT: gl.constexpr, OPERAND: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """One tile of queries from position ``row`` on, added to the gradients of keys and values."""
    column: gl.constexpr = gl.SliceLayout(0, zero.type.layout)
    # Of one matrix of scores.
    PRODUCTS: gl.constexpr = 2 if C.split_channels else 1
    queries.wait(done)
    next_s = scores_of(k, queries.tile(done), zero, C)
    grads.wait(done)
    next_p = scores_of(v, grads.tile(done), zero, C)
    shift = statistics.shift(done, column)
    s = warpgroup_mma_wait(PRODUCTS, deps=(next_s,))
    p = gl.exp2(s * scale2 + shift[None, :])
    if CUT:
        n = row + gl.arange(0, C.N, layout=column)
        p = gl.where((n[None, :] >= first[:, None]) & (n[None, :] < end[:, None]), p, 0.0)
    p_half = gl.convert_layout(p.to(queries.tiles.dtype), OPERAND)
    acc_v = warpgroup_mma(p_half, grads.tile(done), acc_v, is_async=True)
    delta = statistics.delta(done, column)
    grad_p = warpgroup_mma_wait(1, deps=(next_p,))
    grad_s = gl.convert_layout((p * (grad_p - delta[None, :])).to(queries.tiles.dtype), OPERAND)
    acc_k = warpgroup_mma(grad_s, queries.tile(done), acc_k, is_async=True)
    acc_k, acc_v = warpgroup_mma_wait(0, deps=(acc_k, acc_v))
    queries.release(done)
    grads.release(done)
    return acc_k, acc_v


@gluon.jit
def _key_gradients(
    bands, own, queries, grads, statistics, LSE, DELTA, GRAD_K, GRAD_V, lse_at, grad_k_at, grad_v_at, scale,
    WHICH: gl.constexpr,
):  # fmt: skip
    C: gl.constexpr = bands.C
    scores: gl.constexpr = mma_layout(C.N)
    outs: gl.constexpr = mma_layout(C.D)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores)
    out_rows: gl.constexpr = gl.SliceLayout(1, outs)
    operand: gl.constexpr = gl.DotOperandLayout(0, outs, 2)
    linear: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    zero = warpgroup_zeros(C.N)
    scale2 = scale * LOG2E
    k, v = own.parts(0, WHICH, C), own.parts(1, WHICH, C)
    done, turn = 0, 0
    for slot in range(gl.program_id(0), bands.items, gl.num_programs(0)):
        block = bands.block(slot)
        origin, offset, number, keys_end = _own_keys(bands, block)
        if number < keys_end:
            acc_k = warpgroup_zeros(C.D)
            acc_v = warpgroup_zeros(C.D)
            own_number = number + WHICH * HALF
            m = own_number + gl.arange(0, HALF, layout=row_layout)
            least = number_at(block.first_row * 0, origin, offset, 0, C)
            key = gl.maximum(position_of(gl.minimum(m, keys_end - 1), origin, offset, 0, C), 0)
            there = (m >= least) & (m < keys_end)
            first = gl.where(there, first_query(key, origin, 0, C), bands.length)
            end = gl.where(there, end_of_queries(key, origin, bands, 0, C), 0)
            begin, stop = _swept_queries(bands, number, keys_end, origin, offset, C.M)
            tiles = gl.cdiv(gl.maximum(stop - begin, 0), C.N)
            # Which tiles all keys of the warpgroup are read by.
            own_last = gl.minimum(own_number + HALF, keys_end) - 1
            clear = first_query(gl.maximum(position_of(own_last, origin, offset, 0, C), 0), origin, 0, C)
            cut = end_of_queries(gl.maximum(position_of(own_number, origin, offset, 0, C), 0), origin, bands, 0, C)
            some_absent = (own_number < least) | (own_number + HALF > keys_end)
            before, whole, after = _parts(begin, gl.minimum(cut, bands.length), tiles, clear, cut, C)
            before = gl.where(some_absent, tiles, before)
            whole = gl.where(some_absent, 0, whole)
            after = tiles - before - whole

            at = head_start(lse_at, block) + (begin + gl.arange(0, C.N, layout=linear)).to(gl.int64) * lse_at[2]
            row, n = begin, gl.arange(0, C.N, layout=linear)
            own.wait(turn)
            turn += 1
            shift, delta = _read_statistics(LSE + at, DELTA + at, row + n < bands.length)
            statistics.store(done, shift, delta)
            counts = (before, whole, after)
            for part in gl.static_range(3):
                for _ in range(0, counts[part]):
                    at += C.N * lse_at[2]
                    # Those of the next tile, read while this one is computed.
                    shift, delta = _read_statistics(LSE + at, DELTA + at, row + C.N + n < bands.length)
                    acc_k, acc_v = _key_tile(
                        k, v, zero, queries, grads, acc_k, acc_v, statistics, row, first, end, scale2, done,
                        CUT_OF_PART[part], operand, C,
                    )  # fmt: skip
                    statistics.store(done + 1, shift, delta)
                    done += 1
                    row += C.N
            own.release()

            position = gl.convert_layout(key, out_rows).to(gl.int64)[:, None]
            d = gl.arange(0, C.D, layout=gl.SliceLayout(0, outs))[None, :]
            ok = gl.convert_layout(there, out_rows)[:, None] & (d < C.CHANNELS)
            k_at = head_start(grad_k_at, block) + position * grad_k_at[2] + d
            v_at = head_start(grad_v_at, block) + position * grad_v_at[2] + d
            result_k, result_v = acc_k * scale, acc_v
            if C.MERGE:
                result_k += gl.load(GRAD_K + k_at, mask=ok, other=0.0).to(gl.float32)
                result_v += gl.load(GRAD_V + v_at, mask=ok, other=0.0).to(gl.float32)
            gl.store(GRAD_K + k_at, result_k.to(GRAD_K.dtype.element_ty), mask=ok)
            gl.store(GRAD_V + v_at, result_v.to(GRAD_V.dtype.element_ty), mask=ok)


@gluon.jit
def hopper_band_key_value_kernel(
    LSE, DELTA, GRAD_K, GRAD_V,
    q0, q1, q2, q3, q4, g0, g1, g2, g3, g4, k0, k1, k2, k3, k4, v0, v1, v2, v3, v4,
    q_fold, g_fold, k_fold, v_fold, lse_at, grad_k_at, grad_v_at,
    items, length, heads, group, tiles, segment_offset, scale, C: gl.constexpr,
):  # fmt: skip
    """Gradients of ``M`` keys and values of band 0 by query head, added to what earlier launches left if ``MERGE``."""
    own, queries, grads = _shared_memory(k0, v0, q0, g0, C)
    fence_async_shared()
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    first = Statistics(gl.allocate_shared_memory(gl.float32, [4, C.N], plain))
    second = Statistics(gl.allocate_shared_memory(gl.float32, [4, C.N], plain))
    bands = Bands(items, length, heads, group, tiles, segment_offset, C)
    q, g = Source((q0, q1, q2, q3, q4), q_fold), Source((g0, g1, g2, g3, g4), g_fold)
    k, v = Source((k0, k1, k2, k3, k4), k_fold), Source((v0, v1, v2, v3, v4), v_fold)
    gl.warp_specialize(
        [
            (
                _key_gradients,
                (bands, own, queries, grads, first, LSE, DELTA, GRAD_K, GRAD_V, lse_at, grad_k_at, grad_v_at, scale, 0),
            ),
            (
                _key_gradients,
                (bands, own, queries, grads, second, LSE, DELTA, GRAD_K, GRAD_V, lse_at, grad_k_at, grad_v_at, scale, 1),
            ),
            (_produce_queries, (bands, own, (k, v), queries, grads, q, g)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
