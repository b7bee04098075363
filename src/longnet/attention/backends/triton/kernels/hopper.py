"""What the Hopper kernels share: items, ranges, weights, and copies by the tensor memory accelerator. In Gluon.

A launch is persistent: every program takes items (``M`` rows of one class of one segment and head) in the order that
``schedule.py`` has made. One warp of a program copies tiles into shared memory, two warpgroups of 64 rows each compute on
them, as in FlashAttention-3 (arXiv 2407.08608). ``SHAPE`` is a constant tuple: segment lengths, rates, and the classes'
levels, inner rates, steps, first tiles and tiles per residue.

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

from longnet.attention.backends.triton.kernels.rows import head_offset

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
# By whole number, up to the branches of a nest.
LOG2_OF = gl.constexpr((0.0, 0.0, 1.0, 1.584962500721156, 2.0, 2.321928094887362))
# Of powers of two up to a block's rows. Rates of a nest of several branches are such.
SHIFT_OF = gl.constexpr({1: 0, 2: 1, 4: 2, 8: 3, 16: 4, 32: 5, 64: 6})
# Rows of a warpgroup.
HALF = gl.constexpr(64)

# Triton 3.6 has the one name, 3.9 the other.
_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def take_item(
    item, length, heads, segments, TILES: gl.constexpr, SHAPE: gl.constexpr, M: gl.constexpr, BLOCKED: gl.constexpr
):  # fmt: skip
    """(batch, head, segment start and length, level, first position, step, first row, rows) of an item.

    What ``rows.locate`` computes, class by class: dividing by constants takes a few instructions, dividing by numbers that
    are known only at run time is a long chain of them, and an item had several, with nothing to run under them.
    """
    tile = item % TILES
    rest = item // TILES
    start = rest % segments * SHAPE[0][0]
    rest = rest // segments
    head = rest % heads
    batch = rest // heads
    size = gl.minimum(length - start, SHAPE[0][0])
    level, origin, step, first_row, rows = 0, 0, 1, 0, 0
    for i in gl.static_range(len(SHAPE[2])):
        number = tile - SHAPE[5][i]
        residue = head_offset(head, SHAPE[4][i], heads, BLOCKED)
        here = (residue + (1 + number // SHAPE[6][i]) * SHAPE[3][i]) % SHAPE[4][i]
        inside = number >= 0
        level = gl.where(inside, SHAPE[2][i], level)
        origin = gl.where(inside, here, origin)
        step = gl.where(inside, SHAPE[4][i], step)
        first_row = gl.where(inside, number % SHAPE[6][i] * M, first_row)
        rows = gl.where(inside, gl.cdiv(gl.maximum(size - here, 0), SHAPE[4][i]), rows)
    return batch, head, start, size, level, start + origin, step, first_row, rows


@gluon.jit
def load_item(ORDER, slot, items):
    """The item of a slot; past the end any. Loaded a turn ahead, it costs no waiting."""
    return gl.load(ORDER + gl.minimum(slot, items - 1))


@gluon.jit
def swept_range(
    index, start, size, length, head, heads,
    SHAPE: gl.constexpr, CAUSAL: gl.constexpr, LATER: gl.constexpr, BLOCKED: gl.constexpr,
):  # fmt: skip
    """(branch, first position, step, count) of the other side's rows in range ``index``; range 0 is the own segment.

    What ``rows.outer_range`` computes, without dividing by numbers that are known only at run time, see :func:`take_item`.
    """
    if CAUSAL:
        branch = index
        after = index < 0 if not LATER else index >= 0
    else:
        branch = (index + 1) // 2
        after = index % 2 == 0
    offset = head_offset(head, SHAPE[1][0], heads, BLOCKED)
    step = index * 0 + SHAPE[1][0]
    begin = start + offset
    if len(SHAPE[1]) == 1:
        count = gl.cdiv(gl.maximum(size - offset, 0), SHAPE[1][0])
    else:
        RATES: gl.constexpr = SHAPE[1]
        low, middle, finer, width = start, start, 0, 0
        for i in gl.static_range(1, len(SHAPE[1])):
            here = branch == i
            low = gl.where(here, start // SHAPE[0][i] * SHAPE[0][i], low)
            middle = gl.where(here, start // SHAPE[0][i - 1] * SHAPE[0][i - 1], middle)
            finer = gl.where(here, SHAPE[0][i - 1], finer)
            width = gl.where(here, SHAPE[0][i], width)
            step = gl.where(here, SHAPE[1][i], step)
        begin = gl.where(after, middle + finer, low)
        end = gl.where(after, gl.minimum(low + width, length), middle)
        begin = gl.where(index == 0, start, begin) + offset_at(head, step, heads, BLOCKED)
        end = gl.where(index == 0, start + size, end)
        count = (gl.maximum(end - begin, 0) + step - 1) >> shift_of(step, RATES)
    return branch, begin, step, count


@gluon.jit
def limited(count, LIMITS, branch, begin, step, head, SHAPE: gl.constexpr, LIMITED: gl.constexpr):
    """How many of ``count`` swept rows lie before the branch's limit, see :func:`longnet.geometry.needed_rows.swept_limits`."""
    if LIMITED:
        limit = gl.load(LIMITS + head * len(SHAPE[1]) + branch)
        return gl.minimum(count, gl.cdiv(gl.maximum(limit - begin, 0), step))
    else:
        return count


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


@gluon.jit
def block_weights(
    branch,
    step,
    level,
    head,
    heads,
    SHAPE: gl.constexpr,
    COUNT: gl.constexpr,
    BLOCKED: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """log2 of the weights of ``COUNT`` swept rows against owned rows of ``level``; every block of a range has the same."""
    position = offset_at(head, step, heads, BLOCKED) + gl.arange(0, COUNT, layout=LAYOUT) * step
    levels = gl.zeros([COUNT], gl.int32, layout=LAYOUT)
    for i in gl.static_range(len(SHAPE[1])):
        beyond = (position - head_offset(head, SHAPE[1][i], heads, BLOCKED)) & (SHAPE[1][i] - 1)
        levels += (beyond == 0).to(gl.int32)
    multiplicity = gl.minimum(levels, level) - branch
    weights = gl.zeros([COUNT], gl.float32, layout=LAYOUT)
    for i in gl.static_range(2, len(SHAPE[1]) + 1):
        weights = gl.where(multiplicity >= i, LOG2_OF[i], weights)
    return weights


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
def fetch(desc, fold, batch, head, position, step, barrier, target, j, RATES: gl.constexpr):
    """Start copying rows ``position + (j + i) * step`` of a head into shared memory.

    The tensor is seen as a matrix whose rows hold ``step`` tokens, so a residue is a column.
    """
    flat = batch * fold[0] + head * fold[1] + position
    if len(RATES) == 1:
        row, residue = flat // RATES[0], flat % RATES[0]
    else:
        row, residue = flat >> shift_of(step, RATES), flat & (step - 1)
    column = residue * fold[3] + head * fold[2]
    found = False
    for i in gl.static_range(len(RATES)):
        # Two branches of one rate have one view.
        match = (step == RATES[i]) & (not found)
        _copy(desc[i], [row + j, column], barrier, target, pred=match)
        found = found | match


@gluon.constexpr_function
def split_channels(CHANNELS, D):
    """Whether the last quarter of the channels is padding, so that products over channels can do without it."""
    return D // 2 < CHANNELS <= D // 4 * 3


@gluon.jit
def own_parts(tile, CHANNELS: gl.constexpr, D: gl.constexpr):
    """A tile (rows, D) in shared memory as :func:`scores_of` takes it, all of it or half and a quarter of the channels."""
    if split_channels(CHANNELS, D):
        return tile.slice(0, D // 2, dim=1), tile.slice(D // 2, D // 4, dim=1)
    else:
        return (tile,)


@gluon.jit
def scores_of(own, tile, zero, CHANNELS: gl.constexpr, D: gl.constexpr):
    """Start ``own @ tile^T``: one product, or two where :func:`split_channels`, which are waited for together."""
    if split_channels(CHANNELS, D):
        low, high = own_parts(tile, CHANNELS, D)
        acc = warpgroup_mma(own[0], low.permute((1, 0)), zero, use_acc=False, is_async=True)
        return warpgroup_mma(own[1], high.permute((1, 0)), acc, is_async=True)
    else:
        return warpgroup_mma(own[0], tile.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def make_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars
