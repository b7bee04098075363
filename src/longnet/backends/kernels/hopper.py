"""What the Hopper kernels share: items, ranges, weights, and copies by the tensor memory accelerator. In Gluon.

A launch is persistent: every program takes items (``M`` rows of one class of one segment and head) in the order that
:mod:`longnet.backends.schedule` has made. One warp of a program copies tiles into shared memory, two warpgroups of 64 rows
each compute on them, as in FlashAttention-3 (arXiv 2407.08608). ``SHAPE`` is a constant tuple: segment lengths, rates, and
the classes' levels, inner rates, steps, first tiles and tiles per residue.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from longnet.backends.kernels.rows import head_offset, locate, outer_range

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
# Rows of a warpgroup.
HALF = gl.constexpr(64)


@gluon.jit
def take_item(
    item, length, heads, segments, TILES: gl.constexpr, SHAPE: gl.constexpr, M: gl.constexpr, BLOCKED: gl.constexpr
):  # fmt: skip
    """Where the rows of an item lie, see ``locate``."""
    segment_lengths: gl.constexpr = SHAPE[0]
    level: gl.constexpr = SHAPE[2]
    inner: gl.constexpr = SHAPE[3]
    step: gl.constexpr = SHAPE[4]
    first: gl.constexpr = SHAPE[5]
    count: gl.constexpr = SHAPE[6]
    return locate(
        item, length, heads, segments, TILES, segment_lengths, level, inner, step, first, count,
        len(SHAPE[2]), M, BLOCKED, False,
    )  # fmt: skip


@gluon.jit
def load_item(ORDER, slot, items):
    """The item of a slot; past the end any. Loaded a turn ahead, it costs no waiting."""
    return gl.load(ORDER + gl.minimum(slot, items - 1))


@gluon.jit
def swept_range(
    index, start, size, length, head, heads,
    SHAPE: gl.constexpr, CAUSAL: gl.constexpr, LATER: gl.constexpr, BLOCKED: gl.constexpr,
):  # fmt: skip
    """(branch, first position, step, count) of the other side's rows in range ``index``; range 0 is the own segment."""
    segment_lengths: gl.constexpr = SHAPE[0]
    rates: gl.constexpr = SHAPE[1]
    if index == 0:
        branch = index
        step = index + SHAPE[1][0]
        first = start + head_offset(head, step, heads, BLOCKED)
        count = gl.cdiv(gl.maximum(start + size - first, 0), step)
    else:
        branch, first, step, count = outer_range(
            index, start, length, head, heads, segment_lengths, rates, len(SHAPE[1]), CAUSAL, LATER, BLOCKED
        )
    return branch, first, step, count


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
    position = head_offset(head, step, heads, BLOCKED) + gl.arange(0, COUNT, layout=LAYOUT) * step
    levels = gl.zeros([COUNT], gl.int32, layout=LAYOUT)
    for i in gl.static_range(len(SHAPE[1])):
        levels += ((position - head_offset(head, gl.constexpr(SHAPE[1][i]), heads, BLOCKED)) % SHAPE[1][i] == 0).to(
            gl.int32
        )
    return gl.log2((gl.minimum(levels, level) - branch).to(gl.float32))


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
    column = flat % step * fold[3] + head * fold[2]
    row = flat // step + j
    found = False
    for i in gl.static_range(len(RATES)):
        # Two branches of one rate have one view.
        match = (RATES[i] == step) & (not found)
        tma.async_copy_global_to_shared(desc[i], [row, column], barrier, target, pred=match)
        found = found | match


@gluon.jit
def make_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars
