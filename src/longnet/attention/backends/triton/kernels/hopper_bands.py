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
    Source,
    copy_tile,
    head_start,
    make_barriers,
    mma_layout,
    own_parts,
    scores_of,
    warpgroup_rows,
    warpgroup_zeros,
    written_rows,
)
from longnet.attention.backends.triton.kernels.hopper_backward import Statistics, key_block, loaded
from longnet.attention.backends.triton.kernels.hopper_padding import (
    LINEAR,
    key_numbers,
    make_padding,
    padding_at_tokens,
    without_padding,
)
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
    OFFSETS: gl.base_value
    C: gl.constexpr

    @gluon.jit
    def block(self, slot):
        """The positions of a slot's item: queries, or numbers of keys from the first on."""
        if self.C.LONGEST_FIRST:
            # Items grow shorter. Of every second round the programs take theirs in reverse, so that all end together.
            programs = gl.num_programs(0)
            turn = slot // programs
            reversed_slot = (2 * turn + 1) * programs - 1 - slot
            slot = gl.where((turn % 2 == 1) & ((turn + 1) * programs <= self.items), reversed_slot, slot)
            pairs = self.items // self.tiles
            tile, pair = slot // pairs, slot % pairs
        else:
            tile, pair = slot % self.tiles, slot // self.tiles
        if self.C.LAST_FIRST:
            tile = self.tiles - 1 - tile
        batch, head = pair // self.heads, pair % self.heads
        return OwnedRows(batch, head, 0, self.length, 1, 0, 1, tile * self.C.M, self.length, 0)

    @gluon.jit
    def grid(self, block, i: gl.constexpr):
        """(where token 0 stands on a band's grid, the head's offset in it)."""
        return origin_of(self.OFFSETS, block.batch, i, self, self.C), offset_in(block.head, i, self, self.C)

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
def _begin(channel, done):
    """(barrier, tile) of a channel's next stage, which is empty from here on; rows that fill it are announced."""
    STAGES: gl.constexpr = channel.tiles.shape[0]
    stage = done % STAGES
    mbarrier.wait(channel.empty.index(stage), ((done // STAGES) & 1) ^ 1)
    mbarrier.expect(channel.full.index(stage), channel.tiles.shape[1] * channel.tiles.shape[2] * 2)
    return channel.full.index(stage), channel.tiles.index(stage)


@gluon.jit
def _fill_keys(channel, done, source, batch, head, number, origin, offset, i: gl.constexpr, C: gl.constexpr):
    """One tile of keys or values on its way."""
    barrier, tile = _begin(channel, done)
    _copy_keys(source, batch, head, number, origin, offset, barrier, tile, channel.tiles.shape[1], i, C)


@gluon.jit
def _fill_queries(channel, done, source, block, row):
    """One tile of queries or their gradients on its way."""
    barrier, tile = _begin(channel, done)
    source.copy(block.batch, block.head, row, 1, 0, barrier, tile, (1,))


@gluon.jit
def _own(channel, turn, WHICH: gl.constexpr, C: gl.constexpr):
    """A warpgroup's rows of an owned tile, when they are there."""
    channel.wait(turn)
    return own_parts(channel.tile(turn).slice(WHICH * HALF, HALF), C)


@gluon.jit
def _produce_keys(bands, own, own_sources, keys, values, k, v):
    """What the copying warp does where queries are owned."""
    C: gl.constexpr = bands.C
    done, turn = 0, 0
    for slot in range(gl.program_id(0), bands.items, gl.num_programs(0)):
        block = bands.block(slot)
        for one in gl.static_range(len(own)):
            _fill_queries(own[one], turn, own_sources[one], block, block.first_row)
        turn = turn + 1
        kv_head = block.head // bands.group
        for i in gl.static_range(len(C.RATES)):
            origin, offset = bands.grid(block, i)
            begin, _, tiles = bands.swept_keys(block, origin, offset, i)
            for t in range(0, tiles):
                number = begin + t * C.N
                _fill_keys(keys, done, k, block.batch, kv_head, number, origin, offset, i, C)
                _fill_keys(values, done, v, block.batch, kv_head, number, origin, offset, i, C)
                done += 1


@gluon.jit
def _parts(begin, end, tiles, low_last, high_first, C: gl.constexpr):
    """How many tiles some row sees in part, then all rows whole, then some in part."""
    before = gl.minimum(gl.cdiv(gl.maximum(low_last - begin, 0), C.N), tiles)
    whole = gl.maximum(gl.minimum(high_first, end) - begin - before * C.N, 0) // C.N
    whole = gl.minimum(whole, tiles - before)
    return before, whole, tiles - before - whole


@gluon.jit
def _read_by(bands, block, at, first, last, i: gl.constexpr):
    """What a warpgroup's queries ``at`` read in a band.

    ``first`` and ``last`` are their ends. Returns the number of the first key that is copied, how many tiles there are, each
    query's first number and the number after its last; tiles that some query sees in part, that all see, and in part again.
    """
    origin, offset = bands.grid(block, i)
    begin, end, tiles = bands.swept_keys(block, origin, offset, i)
    low, high = bands.keys_of(at, origin, offset, i)
    low_last, _ = bands.keys_of(last, origin, offset, i)
    _, high_first = bands.keys_of(first, origin, offset, i)
    before, whole, after = _parts(begin, end, tiles, low_last, high_first, bands.C)
    return begin, tiles, low, high, before, whole, after


@gluon.jit
def _apart_from_padding(padding, bands, block, j, before, whole, i: gl.constexpr):
    """(tiles that some query sees in part, that all see whole) from number ``j`` on; near padding all of them are the former."""
    C: gl.constexpr = bands.C
    if C.PADDED:
        origin, offset = bands.grid(block, i)
        first = position_of(j + before * C.N, origin, offset, i, C)
        last = position_of(j + (before + whole) * C.N - 1, origin, offset, i, C)
        moved = gl.where(padding.is_near(block.batch, first, last, bands.length), whole, 0)
        return before + moved, whole - moved
    else:
        return before, whole


@gluon.jit
def _padding_of_tile(padding, bands, block, j, i: gl.constexpr, CUT: gl.constexpr):
    """Of a tile's keys from number ``j`` on, where they are compared. To be read before the tile is waited for."""
    C: gl.constexpr = bands.C
    if C.PADDED and CUT:
        origin, offset = bands.grid(block, i)
        token = position_of(j + gl.arange(0, C.N, layout=LINEAR), origin, offset, i, C)
        there = (token >= 0) & (token < bands.length)
        return padding_at_tokens(padding.mask, padding.at, block.batch, token, there)
    else:
        return 0


@gluon.jit
def _seen(s, j, low, high, padding, padded, C: gl.constexpr):
    """Which of a tile's keys, from number ``j`` on, each row reads: shaped like the scores ``s`` (64, N)."""
    number = j + key_numbers(padding, padded, gl.SliceLayout(0, s.type.layout), C)
    return (number[None, :] >= low[:, None]) & (number[None, :] < high[:, None])


@gluon.jit
def _softmax(s, row_max, row_sum, j, low, high, padding, padded, scale2, CUT: gl.constexpr, C: gl.constexpr):
    """(p, rescale, row max, row sum) of one tile of scores."""
    if CUT:
        s = gl.where(_seen(s, j, low, high, padding, padded, C), s, float("-inf"))
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
    q, zero, keys, values, acc, p, row_max, row_sum, j, low, high, padding, padded, scale2, done,
    CUT: gl.constexpr, OPERAND: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """One tile of keys; the product of the tile before with its values runs under this one's exponentials."""
    keys.wait(done)
    next_s = scores_of(q, keys.tile(done), zero, C)
    values.wait(done - 1)
    next_acc = warpgroup_mma(p, values.tile(done - 1), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(next_s,))
    keys.release(done)
    p_new, rescale, row_max, row_sum = _softmax(s, row_max, row_sum, j, low, high, padding, padded, scale2, CUT, C)
    acc = warpgroup_mma_wait(0, deps=(next_acc,))
    values.release(done - 1)
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, acc.type.layout))[:, None]
    return acc, gl.convert_layout(p_new.to(p.dtype), OPERAND), row_max, row_sum


@gluon.constexpr_function
def memory_layout(D):
    """For loads and stores of a warpgroup's rows (64, D): a thread has 16 bytes of a row, its neighbours those beside them."""
    return gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])


@gluon.jit
def _earlier_gradient(rows, ok, C: gl.constexpr):
    """What earlier launches wrote, if ``MERGE``; else nothing that is read."""
    if C.MERGE:
        return gl.load(rows, mask=ok, other=0.0)
    else:
        return rows


@gluon.jit
def _write_gradient(rows, gradient, ok, earlier, C: gl.constexpr):
    """Write a gradient (64, D), added to the ``earlier`` one if ``MERGE``."""
    if C.MERGE:
        gradient += gl.convert_layout(earlier, gradient.type.layout).to(gl.float32)
    gl.store(rows, gl.convert_layout(gradient.to(rows.dtype.element_ty), memory_layout(C.D)), mask=ok)


# Of the parts of a band: whether some row may not see all of its tiles.
CUT_OF_PART = gl.constexpr((True, False, True))


@gluon.jit
def _earlier_result(lse_rows, row_ok, out_rows, ok):
    """(lse, out) that earlier launches wrote."""
    return gl.load(lse_rows, mask=row_ok, other=float("-inf")), gl.load(out_rows, mask=ok, other=0.0)


@gluon.jit
def _forward(bands, queries, keys, values, padding, OUT, LSE, out_at, lse_at, scale, WHICH: gl.constexpr):
    C: gl.constexpr = bands.C
    scores: gl.constexpr = mma_layout(C.N)
    outs: gl.constexpr = mma_layout(C.D)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores)
    out_rows: gl.constexpr = gl.SliceLayout(1, outs)
    operand: gl.constexpr = gl.DotOperandLayout(0, outs, 2)
    zero = warpgroup_zeros(C.N)
    scale2 = scale * LOG2E
    # What is mixed in is read early where there are registers for it: products run under it.
    EARLY: gl.constexpr = C.MERGE and C.D == 64
    done, turn = 0, 0
    for slot in range(gl.program_id(0), bands.items, gl.num_programs(0)):
        block = bands.block(slot)
        own_first, m = warpgroup_rows(block, WHICH, row_layout)
        at = gl.minimum(m, bands.length - 1)
        first, last = gl.minimum(own_first, bands.length - 1), gl.minimum(own_first + HALF, bands.length) - 1
        row_max = gl.full([HALF], float("-inf"), gl.float32, layout=row_layout)
        row_sum = gl.zeros([HALF], gl.float32, layout=row_layout)
        acc = warpgroup_zeros(C.D)
        lse_rows = LSE + head_start(lse_at, block) + m.to(gl.int64) * lse_at[2]
        row_ok = m < bands.length
        if EARLY:
            where, ok = written_rows(out_at, block, own_first, C, memory_layout(C.D))
            earlier, earlier_out = _earlier_result(lse_rows, row_ok, OUT + where, ok)
        p = gl.zeros(zero.shape, keys.tiles.dtype, layout=operand)
        q = _own(queries, turn, WHICH, C)
        if C.D == 64 and len(C.RATES) == 1:
            # In registers, where there are enough: products read less of shared memory.
            q = loaded(q, gl.DotOperandLayout(0, scores, 2))
        for i in gl.static_range(len(C.RATES)):
            j, tiles, low, high, before, whole, after = _read_by(bands, block, at, first, last, i)
            if i == 0:
                # The first tile by itself: nothing runs under its exponentials yet.
                begun_padding = _padding_of_tile(padding, bands, block, j, i, True)
                keys.wait(done)
                begun = scores_of(q, keys.tile(done), zero, C)
                scored = warpgroup_mma_wait(0, deps=(begun,))
                keys.release(done)
                done += 1
                first_p, rescale, row_max, row_sum = _softmax(
                    scored, row_max, row_sum, j, low, high, padding, begun_padding, scale2, True, C
                )
                p = gl.convert_layout(first_p.to(p.dtype), operand)
                j += C.N
                whole -= (before == 0).to(gl.int32) * (whole > 0).to(gl.int32)
                after = tiles - gl.maximum(before, 1) - whole
                before = gl.maximum(before, 1) - 1
            before, whole = _apart_from_padding(padding, bands, block, j, before, whole, i)
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
                        padding,
                        _padding_of_tile(padding, bands, block, j, i, CUT_OF_PART[part]),
                        scale2,
                        done,
                        CUT_OF_PART[part],
                        operand,
                        C,
                    )
                    done += 1
                    j += C.N
        queries.release(turn)
        turn = turn + 1
        if not EARLY:
            where, ok = written_rows(out_at, block, own_first, C, memory_layout(C.D))
            if C.MERGE:
                earlier, earlier_out = _earlier_result(lse_rows, row_ok, OUT + where, ok)
        values.wait(done - 1)
        last_acc = warpgroup_mma(p, values.tile(done - 1), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(last_acc,))
        values.release(done - 1)

        some = row_sum != 0.0
        lse = gl.where(some, row_max * LN2 + gl.log(gl.where(some, row_sum, 1.0)), float("-inf"))
        weight = 1.0 / gl.where(some, row_sum, 1.0)
        if C.MERGE:
            top = gl.maximum(earlier, lse)
            top = gl.where(top == float("-inf"), 0.0, top)
            ours, theirs = gl.exp(lse - top), gl.exp(earlier - top)
            both = ours + theirs
            total = gl.where(both == 0.0, 1.0, both)
            weight = weight * (ours / total)
            earlier_weight = gl.convert_layout(theirs / total, out_rows)
            lse = gl.where(both == 0.0, float("-inf"), top + gl.log(total))
        out = acc * gl.convert_layout(weight, out_rows)[:, None]
        if C.MERGE:
            out += earlier_weight[:, None] * gl.convert_layout(earlier_out, outs).to(gl.float32)
        gl.store(OUT + where, gl.convert_layout(out.to(OUT.dtype.element_ty), memory_layout(C.D)), mask=ok)
        gl.store(lse_rows, lse, mask=row_ok)


@gluon.jit
def _channel(descriptor, COUNT: gl.constexpr, ROWS: gl.constexpr, C: gl.constexpr):
    """``COUNT`` tiles in shared memory, filled by the copying warp and emptied by both warpgroups."""
    tiles = gl.allocate_shared_memory(descriptor.dtype, [COUNT, ROWS, C.D], descriptor.layout)
    return Channel(tiles, make_barriers(COUNT, 1), make_barriers(COUNT, 2))


@gluon.jit
def hopper_band_forward_kernel(
    OUT, LSE, OFFSETS, PADDING, COUNTS,
    q0, q1, q2, q3, q4, k0, k1, k2, k3, k4, v0, v1, v2, v3, v4,
    q_fold, k_fold, v_fold, out_at, lse_at, padding_at,
    items, length, heads, group, tiles, segment_offset, scale, C: gl.constexpr,
):  # fmt: skip
    """``M`` queries over all bands: out and lse, mixed into what earlier launches left if ``MERGE``."""
    queries = _channel(q0, C.OWNED, C.M, C)
    keys, values = _channel(k0, C.STAGES, C.N, C), _channel(v0, C.STAGES, C.N, C)
    first, second = make_padding(PADDING, COUNTS, padding_at, C), make_padding(PADDING, COUNTS, padding_at, C)
    fence_async_shared()
    bands = Bands(items, length, heads, group, tiles, segment_offset, OFFSETS if C.BY_ROW else items, C)
    q = Source((q0, q1, q2, q3, q4), q_fold)
    k, v = Source((k0, k1, k2, k3, k4), k_fold), Source((v0, v1, v2, v3, v4), v_fold)
    gl.warp_specialize(
        [
            (_forward, (bands, queries, keys, values, first, OUT, LSE, out_at, lse_at, scale, 0)),
            (_forward, (bands, queries, keys, values, second, OUT, LSE, out_at, lse_at, scale, 1)),
            (_produce_keys, (bands, (queries,), (q,), keys, values, k, v)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _query_tile(
    q, grad, zero, keys, values, acc, lse2, delta, j, low, high, padding, padded, scale2, done,
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
        seen = _seen(s, j, low, high, padding, padded, C)
        if not C.PADDED:
            p = gl.where(seen, p, 0.0)
    grad_p = warpgroup_mma_wait(0, deps=(next_p,))
    values.release(done)
    grad_s = p * (grad_p - delta[:, None])
    if CUT:
        if C.PADDED:
            # Not the probability: 0 times the NaN that a padded value may give is NaN.
            grad_s = gl.where(seen, grad_s, 0.0)
    grad_s = gl.convert_layout(grad_s.to(keys.tiles.dtype), OPERAND)
    next_acc = warpgroup_mma(grad_s, keys.tile(done), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(next_acc,))
    keys.release(done)
    return acc


@gluon.jit
def _query_gradients(
    bands, queries, grads, keys, values, padding, LSE, DELTA, GRAD_Q, lse_at, grad_q_at, scale, WHICH: gl.constexpr
):
    C: gl.constexpr = bands.C
    scores: gl.constexpr = mma_layout(C.N)
    outs: gl.constexpr = mma_layout(C.D)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores)
    operand: gl.constexpr = gl.DotOperandLayout(0, outs, 2)
    zero = warpgroup_zeros(C.N)
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
        q, grad = _own(queries, turn, WHICH, C), _own(grads, turn, WHICH, C)
        for i in gl.static_range(len(C.RATES)):
            j, _, low, high, before, whole, after = _read_by(bands, block, at, first, last, i)
            before, whole = _apart_from_padding(padding, bands, block, j, before, whole, i)
            counts = (before, whole, after)
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
                        padding,
                        _padding_of_tile(padding, bands, block, j, i, CUT_OF_PART[part]),
                        scale2,
                        done,
                        CUT_OF_PART[part],
                        operand,
                        C,
                    )
                    done += 1
                    j += C.N
        queries.release(turn)
        grads.release(turn)
        turn = turn + 1

        where, ok = written_rows(grad_q_at, block, own_first, C, memory_layout(C.D))
        nothing = gl.convert_layout(lse, gl.SliceLayout(1, outs)) == float("-inf")
        result = gl.where(nothing[:, None], 0.0, acc * scale)
        _write_gradient(GRAD_Q + where, result, ok, _earlier_gradient(GRAD_Q + where, ok, C), C)


@gluon.jit
def hopper_band_query_kernel(
    LSE, DELTA, GRAD_Q, OFFSETS, PADDING, COUNTS,
    q0, q1, q2, q3, q4, g0, g1, g2, g3, g4, k0, k1, k2, k3, k4, v0, v1, v2, v3, v4,
    q_fold, g_fold, k_fold, v_fold, lse_at, grad_q_at, padding_at,
    items, length, heads, group, tiles, segment_offset, scale, C: gl.constexpr,
):  # fmt: skip
    """Gradients of ``M`` queries over all bands, added to what earlier launches left if ``MERGE``."""
    queries, grads = _channel(q0, C.OWNED, C.M, C), _channel(g0, C.OWNED, C.M, C)
    keys, values = _channel(k0, C.STAGES, C.N, C), _channel(v0, C.STAGES, C.N, C)
    first, second = make_padding(PADDING, COUNTS, padding_at, C), make_padding(PADDING, COUNTS, padding_at, C)
    fence_async_shared()
    bands = Bands(items, length, heads, group, tiles, segment_offset, OFFSETS if C.BY_ROW else items, C)
    q, g = Source((q0, q1, q2, q3, q4), q_fold), Source((g0, g1, g2, g3, g4), g_fold)
    k, v = Source((k0, k1, k2, k3, k4), k_fold), Source((v0, v1, v2, v3, v4), v_fold)
    gl.warp_specialize(
        [
            (
                _query_gradients,
                (bands, queries, grads, keys, values, first, LSE, DELTA, GRAD_Q, lse_at, grad_q_at, scale, 0),
            ),
            (
                _query_gradients,
                (bands, queries, grads, keys, values, second, LSE, DELTA, GRAD_Q, lse_at, grad_q_at, scale, 1),
            ),
            (_produce_keys, (bands, (queries, grads), (q, g), keys, values, k, v)),
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
            kv_head = block.head // bands.group
            for one in gl.static_range(2):
                _fill_keys(own[one], turn, own_sources[one], block.batch, kv_head, number, origin, offset, 0, C)
            turn += 1
            begin, stop = _swept_queries(bands, number, end, origin, offset, C.M)
            for t in range(0, gl.cdiv(gl.maximum(stop - begin, 0), C.N)):
                row = begin + t * C.N
                _fill_queries(queries, done, q, block, row)
                _fill_queries(grads, done, g, block, row)
                done += 1


@gluon.jit
def _read_statistics(lse_rows, delta_rows, inside):
    """(shift, delta) of a block of queries: what is added to a scaled score before the exponential, and delta."""
    lse = gl.load(lse_rows, mask=inside, other=float("-inf"))
    # A row without keys has lse -inf and probabilities 0.
    shift = gl.where(lse == float("-inf"), float("-inf"), lse * -LOG2E)
    return shift, gl.load(delta_rows, mask=inside, other=0.0)


@gluon.jit
def _key_tiles(
    k, v, zero, queries, grads, acc_k, acc_v, statistics, lse_rows, delta_rows, step, n, row, length, first, last, scale2, done,
    COUNT: gl.constexpr, CUT: gl.constexpr, OPERAND: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """``COUNT`` tiles of queries from position ``row`` on, whose products run into one another.

    Under each the statistics of the next are read, few by each thread.
    """
    for i in gl.static_range(COUNT):
        at = (i + 1) * C.N
        shift, delta = _read_statistics(lse_rows + at * step, delta_rows + at * step, row + at + n < length)
        acc_k, acc_v = key_block(
            k, v, zero, queries, grads, acc_k, acc_v, statistics, first - row - i * C.N, last - row - i * C.N, scale2,
            done + i, CUT, i > 0, OPERAND, C,
        )  # fmt: skip
        if i == COUNT - 1:
            acc_k, acc_v = warpgroup_mma_wait(0, deps=(acc_k, acc_v))
            queries.release(done + i)
            grads.release(done + i)
        statistics.store(done + i + 1, shift, delta)
    return acc_k, acc_v


# Of the parts of an item of keys, one of them ``C.TOGETHER`` tiles at a time: whether some key may not be read by all queries.
CUT_OF_KEYS = gl.constexpr((True, False, False, True))


@gluon.jit
def _key_gradients(
    bands, keys, values, queries, grads, statistics, LSE, DELTA, GRAD_K, GRAD_V, PADDING,
    lse_at, grad_k_at, grad_v_at, padding_at, scale,
    WHICH: gl.constexpr,
):  # fmt: skip
    C: gl.constexpr = bands.C
    scores: gl.constexpr = mma_layout(C.N)
    outs: gl.constexpr = mma_layout(C.D)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores)
    operand: gl.constexpr = gl.DotOperandLayout(0, outs, 2)
    linear: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    left: gl.constexpr = gl.DotOperandLayout(0, scores, 2)
    TILES_OF_PART: gl.constexpr = (1, 1, C.TOGETHER, 1)
    zero = warpgroup_zeros(C.N)
    scale2 = scale * LOG2E
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
            last = gl.where(there, end_of_queries(key, origin, bands, 0, C), 0) - 1
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
            k, v = _own(keys, turn, WHICH, C), _own(values, turn, WHICH, C)
            if C.D == 64:
                k, v = loaded(k, left), loaded(v, left)
            shift, delta = _read_statistics(LSE + at, DELTA + at, row + n < bands.length)
            statistics.store(done, shift, delta)
            counts = (before, whole % C.TOGETHER, whole // C.TOGETHER, after)
            for part in gl.static_range(4):
                for _ in range(0, counts[part]):
                    acc_k, acc_v = _key_tiles(
                        k, v, zero, queries, grads, acc_k, acc_v, statistics, LSE + at, DELTA + at, lse_at[2], n, row,
                        bands.length, first, last, scale2, done, TILES_OF_PART[part], CUT_OF_KEYS[part], operand, C,
                    )  # fmt: skip
                    at += TILES_OF_PART[part] * C.N * lse_at[2]
                    done += TILES_OF_PART[part]
                    row += TILES_OF_PART[part] * C.N
            keys.release(turn)
            values.release(turn)
            turn += 1

            memory: gl.constexpr = memory_layout(C.D)
            position = gl.convert_layout(key, gl.SliceLayout(1, memory)).to(gl.int64)[:, None]
            d = gl.arange(0, C.D, layout=gl.SliceLayout(0, memory))[None, :]
            ok = gl.convert_layout(there, gl.SliceLayout(1, memory))[:, None] & (d < C.CHANNELS)
            k_at = head_start(grad_k_at, block) + position * grad_k_at[2] + d
            v_at = head_start(grad_v_at, block) + position * grad_v_at[2] + d
            earlier_k, earlier_v = _earlier_gradient(GRAD_K + k_at, ok, C), _earlier_gradient(GRAD_V + v_at, ok, C)
            acc_k *= scale
            if C.PADDED:
                acc_k = without_padding(acc_k, PADDING, padding_at, block.batch, key, there)
                acc_v = without_padding(acc_v, PADDING, padding_at, block.batch, key, there)
            _write_gradient(GRAD_K + k_at, acc_k, ok, earlier_k, C)
            _write_gradient(GRAD_V + v_at, acc_v, ok, earlier_v, C)


@gluon.jit
def hopper_band_key_value_kernel(
    LSE, DELTA, GRAD_K, GRAD_V, OFFSETS, PADDING,
    q0, q1, q2, q3, q4, g0, g1, g2, g3, g4, k0, k1, k2, k3, k4, v0, v1, v2, v3, v4,
    q_fold, g_fold, k_fold, v_fold, lse_at, grad_k_at, grad_v_at, padding_at,
    items, length, heads, group, tiles, segment_offset, scale, C: gl.constexpr,
):  # fmt: skip
    """Gradients of ``M`` keys and values of band 0 by query head, added to what earlier launches left if ``MERGE``."""
    keys, values = _channel(k0, C.OWNED, C.M, C), _channel(v0, C.OWNED, C.M, C)
    queries, grads = _channel(q0, C.STAGES, C.N, C), _channel(g0, C.STAGES, C.N, C)
    fence_async_shared()
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    first = Statistics(gl.allocate_shared_memory(gl.float32, [4, C.N], plain))
    second = Statistics(gl.allocate_shared_memory(gl.float32, [4, C.N], plain))
    bands = Bands(items, length, heads, group, tiles, segment_offset, OFFSETS if C.BY_ROW else items, C)
    q, g = Source((q0, q1, q2, q3, q4), q_fold), Source((g0, g1, g2, g3, g4), g_fold)
    k, v = Source((k0, k1, k2, k3, k4), k_fold), Source((v0, v1, v2, v3, v4), v_fold)
    gl.warp_specialize(
        [
            (
                _key_gradients,
                (
                    bands, keys, values, queries, grads, first, LSE, DELTA, GRAD_K, GRAD_V, PADDING,
                    lse_at, grad_k_at, grad_v_at, padding_at, scale, 0,
                ),
            ),
            (
                _key_gradients,
                (
                    bands, keys, values, queries, grads, second, LSE, DELTA, GRAD_K, GRAD_V, PADDING,
                    lse_at, grad_k_at, grad_v_at, padding_at, scale, 1,
                ),
            ),
            (_produce_queries, (bands, (keys, values), (k, v), queries, grads, q, g)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
