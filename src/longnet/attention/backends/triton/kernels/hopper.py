"""What the Hopper kernels share: items, ranges, weights, and copies by the tensor memory accelerator. In Gluon.

A launch is persistent: every program takes items (``M`` rows of one class of one segment and head) in the order that
``schedule.py`` has made. One warp of a program copies tiles into shared memory, two warpgroups of 64 rows each compute on
them, as in FlashAttention-3 (arXiv 2407.08608). A kernel's constants ``C`` are a ``hopper.Constants``.

Rows at a stride are a column of a matrix whose rows hold ``stride`` tokens: hence one descriptor per rate. Blocks go from the
diagonal down, so that each warpgroup skips what only the other needs, and masks are a loop of their own. The backward pass has
two kernels, one that owns queries and one that owns keys: it computes scores twice and needs no atomics, so two runs are
bit-identical. Places and ranges are computed with constant divisors, since a nest is a constant of the kernel: a division by a
number that is known at run time is a long chain of instructions. Tiles have 64 or 128 channels, others are filled up with
zeros; of 48 or 96 the last quarter is not multiplied where a product sums over channels.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma

from longnet.attention.backends.triton.kernels.rows import (
    OwnedRows,
    SweptRows,
    from_token_0,
    head_offset,
    tokens_before,
)
from longnet.attention.backends.triton.kernels.triton_internals import aggregate

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
# By whole number, up to the branches of a nest.
LOG2_OF = gl.constexpr((0.0, 0.0, 1.0, 1.584962500721156, 2.0, 2.321928094887362))
# Of powers of two up to a block's rows. Rates of a nest of several branches are such.
SHIFT_OF = gl.constexpr({1: 0, 2: 1, 4: 2, 8: 3, 16: 4, 32: 5, 64: 6})
# Rows of a warpgroup.
HALF = gl.constexpr(64)

# Triton 3.6 has the one name, 3.9 the other.
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@aggregate
class Program:
    """What all warps of a program know of the launch.

    ORDER: the items. LIMITS (heads, branches), read where ``C.LIMITED``: see
    :func:`longnet.geometry.needed_rows.swept_limits`. OFFSETS of the grid, read where ``C.BY_ROW``; else ``segment_offset`` is
    that of all rows of the batch, where ``C.OFFSET``. C: the constants.
    """

    ORDER: gl.tensor
    LIMITS: gl.tensor
    OFFSETS: gl.tensor
    segment_offset: gl.base_value
    items: gl.base_value
    length: gl.base_value
    heads: gl.base_value
    group: gl.base_value
    segments: gl.base_value
    C: gl.constexpr

    @gluon.jit
    def load_item(self, slot):
        """The item of a slot; past the end any."""
        return gl.load(self.ORDER + gl.minimum(slot, self.items - 1))

    @gluon.jit
    def take(self, item, slot):
        """(the rows of an item, the item of the program's next slot). Loaded a turn ahead, it costs no waiting."""
        upcoming = self.load_item(slot + gl.num_programs(0))
        return self.block(item), upcoming

    @gluon.jit
    def block(self, item):
        """The rows of an item.

        What ``rows.locate`` computes, class by class: dividing by constants takes a few instructions, dividing by numbers
        that are known only at run time is a long chain of them, and an item had several, with nothing to run under them.
        """
        NEST: gl.constexpr = self.C.NEST
        tile = item % self.C.TILES
        rest = item // self.C.TILES
        start = rest % self.segments * NEST.segment_lengths[0]
        rest = rest // self.segments
        head = rest % self.heads
        batch = rest // self.heads
        before = 0
        if self.C.OFFSET:
            LONGEST: gl.constexpr = NEST.segment_lengths[len(NEST.segment_lengths) - 1]
            before = tokens_before(self.OFFSETS, self.segment_offset, batch, LONGEST, self.C.BY_ROW)
            start -= before % NEST.segment_lengths[0]
        size = gl.minimum(self.length - start, NEST.segment_lengths[0])
        level, origin, step, first_row, rows = 0, 0, 1, 0, 0
        for i in gl.static_range(len(NEST.steps)):
            number = tile - NEST.first_tiles[i]
            residue = head_offset(head, NEST.steps[i], self.heads, self.C.BLOCKED)
            here = (residue + (1 + number // NEST.tiles[i]) * NEST.inner_rates[i]) % NEST.steps[i]
            if self.C.OFFSET:
                first, _ = from_token_0(start + here, NEST.steps[i], self.C)
                here = first - start
            inside = number >= 0
            level = gl.where(inside, NEST.levels[i], level)
            origin = gl.where(inside, here, origin)
            step = gl.where(inside, NEST.steps[i], step)
            first_row = gl.where(inside, number % NEST.tiles[i] * self.C.M, first_row)
            rows = gl.where(inside, gl.cdiv(gl.maximum(size - here, 0), NEST.steps[i]), rows)
        return OwnedRows(batch, head, start, size, level, start + origin, step, first_row, rows, before)

    @gluon.jit
    def ranges(self, block):
        """How many ranges of the other side a block meets."""
        return block.level if self.C.CAUSAL else 2 * block.level - 1

    @gluon.jit
    def swept(self, block, index, LATER: gl.constexpr):
        """The other side's rows in range ``index``, those before the branch's limit where there is one.

        What ``rows.outer_range`` computes, without dividing by numbers that are known only at run time, see :meth:`block`.
        Range 0 is the own segment.
        """
        LENGTHS: gl.constexpr = self.C.NEST.segment_lengths
        RATES: gl.constexpr = self.C.NEST.dilation_rates
        if self.C.CAUSAL:
            branch = index
            after = index < 0 if not LATER else index >= 0
        else:
            branch = (index + 1) // 2
            after = index % 2 == 0
        offset = head_offset(block.head, RATES[0], self.heads, self.C.BLOCKED)
        step = index * 0 + RATES[0]
        first = block.start + offset
        number = index * 0
        if len(RATES) == 1:
            if self.C.OFFSET:
                first, number = from_token_0(first, RATES[0], self.C)
            count = gl.cdiv(gl.maximum(block.start + block.size - first, 0), RATES[0])
        else:
            grid = block.start + block.before
            low, middle, finer, width = block.start, block.start, 0, 0
            for i in gl.static_range(1, len(RATES)):
                here = branch == i
                low = gl.where(here, grid // LENGTHS[i] * LENGTHS[i] - block.before, low)
                middle = gl.where(here, grid // LENGTHS[i - 1] * LENGTHS[i - 1] - block.before, middle)
                finer = gl.where(here, LENGTHS[i - 1], finer)
                width = gl.where(here, LENGTHS[i], width)
                step = gl.where(here, RATES[i], step)
            first = gl.where(after, middle + finer, low)
            end = gl.where(after, gl.minimum(low + width, self.length), middle)
            first = gl.where(index == 0, block.start, first) + offset_at(block.head, step, self.heads, self.C.BLOCKED)
            end = gl.where(index == 0, block.start + block.size, end)
            if self.C.OFFSET:
                number = (gl.maximum(-first, 0) + step - 1) >> shift_of(step, RATES)
                first += number * step
            count = (gl.maximum(end - first, 0) + step - 1) >> shift_of(step, RATES)
        if self.C.LIMITED:
            limit = gl.load(self.LIMITS + block.head * len(RATES) + branch)
            count = gl.minimum(count, gl.cdiv(gl.maximum(limit - first, 0), step))
        return SweptRows(branch, first, step, count, number)

    @gluon.jit
    def weights(self, block, swept, COUNT: gl.constexpr, LAYOUT: gl.constexpr):
        """log2 of the weights of ``COUNT`` swept rows against owned rows; every block of a range has the same."""
        RATES: gl.constexpr = self.C.NEST.dilation_rates
        position = offset_at(block.head, swept.step, self.heads, self.C.BLOCKED)
        position = position + (swept.number + gl.arange(0, COUNT, layout=LAYOUT)) * swept.step
        levels = gl.zeros([COUNT], gl.int32, layout=LAYOUT)
        for i in gl.static_range(len(RATES)):
            beyond = (position - head_offset(block.head, RATES[i], self.heads, self.C.BLOCKED)) & (RATES[i] - 1)
            levels += (beyond == 0).to(gl.int32)
        multiplicity = gl.minimum(levels, block.level) - swept.branch
        weights = gl.zeros([COUNT], gl.float32, layout=LAYOUT)
        for i in gl.static_range(2, len(RATES) + 1):
            weights = gl.where(multiplicity >= i, LOG2_OF[i], weights)
        return weights


@gluon.jit
def make_program(ORDER, LIMITS, OFFSETS, segment_offset, items, length, heads, group, segments, C: gl.constexpr):
    """A launch's :class:`Program`; ``OFFSETS`` and ``segment_offset`` are None where they are not read."""
    offsets, offset = ORDER, items
    if C.BY_ROW:
        offsets = OFFSETS
    elif C.OFFSET:
        offset = segment_offset
    return Program(ORDER, LIMITS, offsets, offset, items, length, heads, group, segments, C)


@gluon.jit
def shift_of(step, RATES: gl.constexpr):
    """The logarithm of a step that is one of several rates."""
    shift = step * 0
    for i in gl.static_range(len(RATES)):
        shift = gl.where(step == RATES[i], SHIFT_OF[RATES[i]], shift)
    return shift


@gluon.jit
def offset_at(head, step, heads, BLOCKED: gl.constexpr):
    """The head's offset in a branch of a nest of several, whose rate is a power of two."""
    if BLOCKED:
        return head // gl.cdiv(heads, step)
    else:
        return head & (step - 1)


@aggregate
class Source:
    """A tensor (B, H, N, D) as matrices: a descriptor per rate, and the integers of its ``runtime.tma.View``."""

    views: gl.tuple
    fold: gl.tuple

    @gluon.jit
    def copy(self, batch, head, first, step, row, barrier, target, RATES: gl.constexpr):
        """Start copying rows ``first + (row + i) * step`` of a head into shared memory.

        The tensor is seen as a matrix whose rows hold ``step`` tokens, so a residue is a column.
        """
        flat = batch * self.fold[0] + head * self.fold[1] + first
        if len(RATES) == 1:
            matrix_row, residue = flat // RATES[0], flat % RATES[0]
        else:
            matrix_row, residue = flat >> shift_of(step, RATES), flat & (step - 1)
        column = residue * self.fold[3] + head * self.fold[2]
        found = False
        for i in gl.static_range(len(RATES)):
            # Two branches of one rate have one view.
            match = (step == RATES[i]) & (not found)
            copy_tile(self.views[i], [matrix_row + row, column], barrier, target, pred=match)
            found = found | match


@aggregate
class OwnedTiles:
    """A program's own rows of one or two tensors in shared memory, (M, D) each, and when they are full or empty."""

    tiles: gl.tuple
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor

    @gluon.jit
    def fill(self, turn, sources, head, block, RATES: gl.constexpr):
        mbarrier.wait(self.empty.index(0), (turn & 1) ^ 1)
        mbarrier.expect(self.full.index(0), len(self.tiles) * sources[0].views[0].block_type.nbytes)
        for i in gl.static_range(len(self.tiles)):
            sources[i].copy(
                block.batch, head, block.origin, block.step, block.first_row, self.full.index(0), self.tiles[i], RATES
            )

    @gluon.jit
    def wait(self, turn):
        mbarrier.wait(self.full.index(0), turn & 1)

    @gluon.jit
    def release(self):
        mbarrier.arrive(self.empty.index(0))

    @gluon.jit
    def parts(self, which, WHICH: gl.constexpr, C: gl.constexpr):
        """A warpgroup's rows of a tensor, see :func:`own_parts`."""
        return own_parts(self.tiles[which].slice(WHICH * HALF, HALF), C)


@aggregate
class Channel:
    """Swept tiles on their way from the copying warp to the computing ones: stages in shared memory, full or empty each."""

    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor

    @gluon.jit
    def tile(self, done):
        return self.tiles.index(done % self.tiles.shape[0])

    @gluon.jit
    def fill(self, done, source, batch, head, swept, row, RATES: gl.constexpr):
        stage = done % self.tiles.shape[0]
        mbarrier.wait(self.empty.index(stage), ((done // self.tiles.shape[0]) & 1) ^ 1)
        mbarrier.expect(self.full.index(stage), source.views[0].block_type.nbytes)
        source.copy(batch, head, swept.first, swept.step, row, self.full.index(stage), self.tiles.index(stage), RATES)

    @gluon.jit
    def wait(self, done):
        mbarrier.wait(self.full.index(done % self.tiles.shape[0]), (done // self.tiles.shape[0]) & 1)

    @gluon.jit
    def release(self, done):
        mbarrier.arrive(self.empty.index(done % self.tiles.shape[0]))


@gluon.jit
def make_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def own_parts(tile, C: gl.constexpr):
    """A tile (rows, D) in shared memory as :func:`scores_of` takes it, all of it or half and a quarter of the channels."""
    if C.split_channels:
        return tile.slice(0, C.D // 2, dim=1), tile.slice(C.D // 2, C.D // 4, dim=1)
    else:
        return (tile,)


@gluon.jit
def scores_of(own, tile, zero, C: gl.constexpr):
    """Start ``own @ tile^T``: one product, or two where ``C.split_channels``, which are waited for together."""
    if C.split_channels:
        low, high = own_parts(tile, C)
        acc = warpgroup_mma(own[0], low.permute((1, 0)), zero, use_acc=False, is_async=True)
        return warpgroup_mma(own[1], high.permute((1, 0)), acc, is_async=True)
    else:
        return warpgroup_mma(own[0], tile.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def column_shift(parts, weights, base):
    """``weights - base`` shaped like ``parts`` (rows, periods, period), from one period of weights and a value per row.

    Spelt by periods, so that the compiler sees how few different values there are and computes each once.
    """
    layout: gl.constexpr = parts.type.layout
    by_row = gl.convert_layout(base, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    by_column = gl.convert_layout(weights, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    return by_column[None, None, :] - by_row[:, None, None]


@gluon.jit
def weighted_exponentials(s, scale2, base, weights, C: gl.constexpr):
    """``exp2(s * scale2 - base)`` of scores (64, N), times the weights of their columns where the nest has several branches."""
    if C.weighted:
        parts = gl.reshape(s, [s.shape[0], C.N // C.period, C.period])
        p = gl.exp2(parts * scale2 + column_shift(parts, weights, base))
        return gl.convert_layout(gl.reshape(p, [s.shape[0], C.N]), s.type.layout)
    else:
        return gl.exp2(s * scale2 - base[:, None])


@gluon.constexpr_function
def mma_layout(COLUMNS):
    """The layout of a warpgroup's product with ``COLUMNS`` columns."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])


@gluon.jit
def warpgroup_zeros(COLUMNS: gl.constexpr):
    """Zeros in the layout of a warpgroup's product."""
    return gl.zeros([HALF, COLUMNS], gl.float32, layout=mma_layout(COLUMNS))


@gluon.jit
def warpgroup_rows(block, WHICH: gl.constexpr, LAYOUT: gl.constexpr):
    """(number of a warpgroup's first row, numbers of its rows)."""
    own_first = block.first_row + WHICH * HALF
    return own_first, own_first + gl.arange(0, HALF, layout=LAYOUT)


@gluon.jit
def head_start(at, block):
    """Elements before the first token of a block's head, in a tensor with the strides ``at``."""
    return gl.cast(block.batch, gl.int64) * at[0] + gl.cast(block.head, gl.int64) * at[1]


@gluon.jit
def written_rows(at, block, own_first, C: gl.constexpr, LAYOUT: gl.constexpr):
    """(elements before each, which of them there are) of the channels (64, D) that a warpgroup writes."""
    m = own_first + gl.arange(0, HALF, layout=gl.SliceLayout(1, LAYOUT))
    d = gl.arange(0, C.D, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    where = (block.origin + m * block.step).to(gl.int64)[:, None] * at[2]
    where += d
    where += head_start(at, block)
    ok = (m < block.count)[:, None]
    if C.CHANNELS < C.D:
        ok = ok & (d < C.CHANNELS)
    return where, ok


@gluon.jit
def all_keys(keys, LAYOUT: gl.constexpr, C: gl.constexpr):
    """(each query's last key, keys that all of them see, the last block of keys) where every query sees every key."""
    last = gl.full([HALF], 0, gl.int32, layout=LAYOUT) + (keys.count - 1)
    return last, keys.count, gl.cdiv(keys.count, C.N) - 1


@gluon.jit
def seen_keys(block, keys, m, last, WHICH: gl.constexpr, C: gl.constexpr):
    """What :func:`all_keys` says, and the last block for both warpgroups, in the queries' own segment of a causal pattern.

    Rows of a nest lie on the finest branch's keys, so positions compare as key indices.
    """
    RATE: gl.constexpr = C.NEST.dilation_rates[0]
    ratio = block.step // RATE
    seen = (block.origin - keys.first) // RATE + (block.first_row + WHICH * HALF) * ratio
    last = gl.minimum(last, (block.origin - keys.first) // RATE + m * ratio)
    all_top = (gl.minimum(keys.count, seen + (C.M - 1 - WHICH * HALF) * ratio + 1) - 1) // C.N
    top = gl.minimum(all_top, (seen + (HALF - 1) * ratio) // C.N)
    return last, gl.minimum(keys.count, seen + 1), top, all_top


@gluon.jit
def produce(program, own, own_sources, first, second, sources, KEYS: gl.constexpr):
    """What the copying warp does in every kernel: owned rows once an item, two swept tensors block by block.

    ``KEYS`` are owned or, else, swept.
    """
    C: gl.constexpr = program.C
    RATES: gl.constexpr = C.NEST.dilation_rates
    done, turn, upcoming = 0, 0, program.load_item(gl.program_id(0))
    for slot in range(gl.program_id(0), program.items, gl.num_programs(0)):
        block, upcoming = program.take(upcoming, slot)
        if block.first_row < block.count:
            own.fill(turn, own_sources, block.head // program.group if KEYS else block.head, block, RATES)
            turn += 1
            swept_head = block.head if KEYS else block.head // program.group
            for index in range(0, program.ranges(block)):
                swept = program.swept(block, index, KEYS)
                low, count = 0, swept.count
                if C.CAUSAL:
                    if index == 0:
                        if KEYS:
                            low = ((block.origin + block.first_row * block.step - swept.first) // RATES[0]) // C.N
                        else:
                            last = block.origin + (block.first_row + C.M - 1) * block.step
                            count = gl.minimum(count, (last - swept.first) // RATES[0] + 1)
                blocks = gl.cdiv(count, C.N)
                for i in range(0, blocks - low):
                    # From the diagonal down: a warpgroup skips the blocks past its last row before it starts.
                    row = (blocks - 1 - i) * C.N
                    first.fill(done, sources[0], block.batch, swept_head, swept, row, RATES)
                    second.fill(done, sources[1], block.batch, swept_head, swept, row, RATES)
                    done += 1


@gluon.jit
def skip(first, second, done):
    """Pass over a block that only the other warpgroup needs."""
    first.wait(done)
    first.release(done)
    second.wait(done)
    second.release(done)
