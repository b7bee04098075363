"""Where a program's rows lie and which ranges of the other side they meet: the kernels' view of ``geometry.nests``.

Everything is an integer or a vector of them; element offsets are 64 bits wide, positions 32. The general kernels get a
``launches.NestShape``, the ``launches.Sizes`` of a launch and, as constants ``C``, its ``launches.Settings``. Their state is
in named tuples, which Triton's interpreter runs as plain Python.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class OwnedRows(NamedTuple):
    """The rows that a program owns: some, from ``first_row`` on, of the ``count`` of one class in one segment and head.

    The segment of the finest branch has ``size`` tokens from ``start`` on, which is below 0 where the grid begins earlier.
    Row i of the class stands at ``origin + i * step``. ``before`` tokens of the grid come before token 0.
    """

    batch: Any
    head: Any
    start: Any
    size: Any
    level: Any
    origin: Any
    step: Any
    first_row: Any
    count: Any
    before: Any


class SweptRows(NamedTuple):
    """One range of the other side that owned rows meet: ``count`` rows of a branch, at ``first + i * step``.

    ``number`` rows of the range come before them: those that stand before token 0.
    """

    branch: Any
    first: Any
    step: Any
    count: Any
    number: Any


class KeyTiles(NamedTuple):
    """The keys and values of a range: the pointers of the first ``N``, elements from one row to the next, each query's last."""

    k: Any
    k_step: Any
    v: Any
    v_step: Any
    keys: SweptRows
    last: Any


class Extras(NamedTuple):
    """Padding of a batch row, and the relative bias of a head: pointers, a stride, and the place of distance 0."""

    padding: Any
    padding_step: Any
    bias: Any
    bias_centre: Any


LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def pick(values, index):
    """``values[index]`` for an index that is known only at run time."""
    found = values[0] + 0
    for i in tl.static_range(1, len(values)):
        found = tl.where(index == i, values[i], found)
    return found


@triton.jit
def head_offset(head, rate, heads, BLOCKED: tl.constexpr):
    """The head's offset in a branch of this rate (SPEC of the pattern: interleaved or blocked)."""
    if BLOCKED:
        return head // tl.cdiv(heads, rate)
    else:
        return head % rate


@triton.jit
def tokens_before(OFFSETS, segment_offset, batch, period, BY_ROW: tl.constexpr):
    """How many tokens of a grid, which repeats after ``period``, come before token 0."""
    offset = tl.cast(segment_offset, tl.int64)
    if BY_ROW:
        offset = tl.load(OFFSETS + batch)
    # Division rounds to zero.
    return tl.cast((offset % period + period) % period, tl.int32)


@triton.jit
def from_token_0(first, step, C: tl.constexpr):
    """(the first of these rows that is not before token 0, how many are)."""
    if C.OFFSET:
        number = tl.cdiv(tl.maximum(-first, 0), step)
        return first + number * step, number
    else:
        return first, step * 0


@triton.jit
def locate(OFFSETS, sizes, nest, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr, C: tl.constexpr):
    """The ``BLOCK`` rows of this program. Programs that read the same segment are neighbours."""
    tile = tl.program_id(0) % sizes.tiles
    if LAST_FIRST:
        # The longest rows of a causal segment first, so that short programs fill the last wave.
        tile = sizes.tiles - 1 - tile
    rest = tl.program_id(0) // sizes.tiles
    start = rest % sizes.segments * nest.segment_lengths[0]
    rest = rest // sizes.segments
    head = rest % sizes.heads
    batch = rest // sizes.heads
    level, inner, step, first, count = (
        nest.levels[0] + 0, nest.inner_rates[0] + 0, nest.steps[0] + 0, nest.first_tiles[0] + 0, nest.tiles[0] + 0,
    )  # fmt: skip
    for i in tl.static_range(1, len(nest.steps)):
        inside = tile >= nest.first_tiles[i]
        level = tl.where(inside, nest.levels[i], level)
        inner = tl.where(inside, nest.inner_rates[i], inner)
        step = tl.where(inside, nest.steps[i], step)
        first = tl.where(inside, nest.first_tiles[i], first)
        count = tl.where(inside, nest.tiles[i], count)
    tile -= first
    origin = (head_offset(head, step, sizes.heads, C.BLOCKED) + (1 + tile // count) * inner) % step
    before = 0
    if C.OFFSET:
        longest = nest.segment_lengths[len(nest.segment_lengths) - 1]
        before = tokens_before(OFFSETS, sizes.segment_offset, batch, longest, C.BY_ROW)
        start -= before % nest.segment_lengths[0]
    size = tl.minimum(nest.segment_lengths[0], sizes.length - start)
    first, _ = from_token_0(start + origin, step, C)
    rows = tl.cdiv(tl.maximum(start + size - first, 0), step)
    return OwnedRows(batch, head, start, size, level, first, step, tile % count * BLOCK, rows, before)


@triton.jit
def heads_of(block, sizes):
    """(batch row, query head, key head) of a block, for element offsets."""
    return tl.cast(block.batch, tl.int64), tl.cast(block.head, tl.int64), tl.cast(block.head // sizes.group, tl.int64)


@triton.jit
def own_rows(block, BLOCK: tl.constexpr, C: tl.constexpr):
    """(channels, positions, which channels, rows and elements there are) of the block."""
    d, number = tl.arange(0, C.D_BLOCK), block.first_row + tl.arange(0, BLOCK)
    d_ok, row_ok = d < C.D, number < block.count
    return d, block.origin + number * block.step, d_ok, row_ok, row_ok[:, None] & d_ok[None, :]


@triton.jit
def accumulator(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros that products are added to."""
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def ranges_of(block, C: tl.constexpr):
    """How many ranges of the other side a block meets."""
    if C.CAUSAL:
        return block.level
    else:
        return 2 * block.level - 1


@triton.jit
def own_range(block, sizes, nest, C: tl.constexpr):
    """Range 0: what the finest branch selects in the block's own segment."""
    branch = 0
    step = nest.dilation_rates[0] + 0
    first, number = from_token_0(block.start + head_offset(block.head, step, sizes.heads, C.BLOCKED), step, C)
    return SweptRows(branch, first, step, tl.cdiv(tl.maximum(block.start + block.size - first, 0), step), number)


@triton.jit
def outer_range(index, block, sizes, nest, LATER: tl.constexpr, C: tl.constexpr):
    """Range ``index >= 1``: what branch ``i`` selects outside branch ``i - 1``.

    A causal query meets the range before the finer segment; a causal key (``LATER``) the one after it; otherwise both,
    in turn.
    """
    if C.CAUSAL:
        branch = index
        after = index < 0 if not LATER else index >= 0
    else:
        branch = (index + 1) // 2
        after = index % 2 == 0
    rate = pick(nest.dilation_rates, branch)
    width = pick(nest.segment_lengths, branch)
    finer = pick(nest.segment_lengths, branch - 1)
    low = (block.start + block.before) // width * width - block.before
    middle = (block.start + block.before) // finer * finer - block.before
    begin = tl.where(after, middle + finer, low)
    end = tl.where(after, tl.minimum(low + width, sizes.length), middle)
    first, number = from_token_0(begin + head_offset(block.head, rate, sizes.heads, C.BLOCKED), rate, C)
    return SweptRows(branch, first, rate, tl.cdiv(tl.maximum(end - first, 0), rate), number)


@triton.jit
def key_range(index, block, row, sizes, nest, C: tl.constexpr):
    """(keys that a block of queries at the positions ``row`` meets in range ``index``, whole, last).

    Every row sees the first ``whole`` keys, a multiple of ``N``; no row sees more than there are, and each its own up to
    ``last``.
    """
    first_row = block.origin + block.first_row * block.step
    last_row = block.origin + (block.first_row + C.M - 1) * block.step
    if index == 0:
        branch, first, step, count, number = own_range(block, sizes, nest, C)
        whole = count
        if C.CAUSAL:
            # Rows of a nest lie on the finest branch's keys, so positions compare as key indices.
            whole = tl.minimum(count, (first_row - first) // step + 1)
            count = tl.minimum(count, (last_row - first) // step + 1)
    else:
        branch, first, step, count, number = outer_range(index, block, sizes, nest, False, C)
        whole = count
    last = tl.zeros_like(row) + (count - 1)
    if C.CAUSAL:
        last = tl.minimum(last, (row - first) // step)
    return SweptRows(branch, first, step, count, number), whole // C.N * C.N, last


@triton.jit
def range_weights(swept, block, sizes, nest, C: tl.constexpr):
    """log2 of the weights of one period of a range's rows against the block's; every block of the range has the same."""
    PERIOD: tl.constexpr = C.PERIOD
    rows = swept.number + tl.arange(0, PERIOD)
    position = head_offset(block.head, swept.step, sizes.heads, C.BLOCKED) + rows * swept.step
    levels = tl.zeros([PERIOD], tl.int32)
    for i in tl.static_range(len(nest.dilation_rates)):
        rate = nest.dilation_rates[i]
        levels += ((position - head_offset(block.head, rate, sizes.heads, C.BLOCKED)) % rate == 0).to(tl.int32)
    return tl.log2((tl.minimum(levels, block.level) - swept.branch).to(tl.float32))


@triton.jit
def exponentials(s, base, weights, C: tl.constexpr):
    """``exp2(s - base)`` of scaled scores (M, N), times the weights of their columns where the rows have several levels.

    Weights are spelt by periods, so that the compiler sees how few different values there are and computes each once.
    """
    M: tl.constexpr = C.M
    N: tl.constexpr = C.N
    PERIOD: tl.constexpr = C.PERIOD
    if C.WEIGHTED:
        shift = tl.broadcast_to(weights[None, None, :] - base[:, None, None], [M, N // PERIOD, PERIOD])
        return tl.exp2(s + tl.reshape(shift, [M, N]))
    else:
        return tl.exp2(s - base[:, None])


@triton.jit
def head_rows(POINTER, at, batch, head):
    """Where the rows of a head begin, in a tensor with the strides ``at``."""
    return POINTER + batch * at[0] + head * at[1]


@triton.jit
def swept_tile(rows, at, swept, n):
    """(the rows ``n`` of a range, elements from one row to the next), given where the head's rows begin."""
    step = tl.cast(swept.step, tl.int64) * at[2]
    return rows + tl.cast(swept.first, tl.int64) * at[2] + n * step, step


@triton.jit
def key_tiles(index, k_rows, v_rows, k_at, v_at, block, row, sizes, nest, C: tl.constexpr):
    """(the keys and values of :func:`key_range`, whole), given where the rows of their head begin, with channels."""
    keys, whole, last = key_range(index, block, row, sizes, nest, C)
    n = tl.arange(0, C.N)[:, None]
    k, k_step = swept_tile(k_rows, k_at, keys, n)
    v, v_step = swept_tile(v_rows, v_at, keys, n)
    return KeyTiles(k, k_step, v, v_step, keys, last), whole


@triton.jit
def load_tile(rows, inside, d_ok, CUT: tl.constexpr, C: tl.constexpr):
    """Rows with their channels; those that are not ``inside`` are 0, where ``CUT``."""
    if CUT:
        return tl.load(rows, mask=inside[:, None] & d_ok[None, :], other=0.0)
    elif C.D == C.D_BLOCK:
        return tl.load(rows)
    else:
        return tl.load(rows, mask=d_ok[None, :], other=0.0)


@triton.jit
def extras_of(PADDING, BIAS, padding_at, bias_at, batch, head):
    """Those of a batch row and head; strides as ``backend`` gives them."""
    return Extras(PADDING + batch * padding_at[0], padding_at[1], BIAS + head * bias_at[0], bias_at[1])


@triton.jit
def padding_alone(PADDING, padding_at, batch):
    """:func:`extras_of` for kernels that take no bias."""
    return Extras(PADDING + batch * padding_at[0], padding_at[1], PADDING, 0)


@triton.jit
def bias_of(extras, distance, mask):
    """The bias at distances from query to key, in the base of the exponentials."""
    return LOG2E * tl.load(extras.bias + (distance + extras.bias_centre), mask=mask, other=0.0)


@triton.jit
def padding_of(extras, key, inside, CUT: tl.constexpr):
    """Not 0 where keys are padding and, where ``CUT``, not ``inside``."""
    rows = extras.padding + key.to(tl.int64) * extras.padding_step
    if CUT:
        return tl.load(rows, mask=inside, other=1)
    else:
        return tl.load(rows)


@triton.jit
def mixed(out, lse, out_rows, lse_rows, row_ok, stored):
    """(out, lse) of rows and of what earlier launches left of them in memory."""
    before = tl.load(lse_rows, mask=row_ok, other=float("-inf"))
    top = tl.maximum(before, lse)
    base = tl.where(top == float("-inf"), 0.0, top)
    ours, theirs = tl.exp(lse - base), tl.exp(before - base)
    both = ours + theirs
    some = both != 0.0
    both = tl.where(some, both, 1.0)
    previous = tl.load(out_rows, mask=stored, other=0.0).to(tl.float32)
    out = previous + (ours / both)[:, None] * (out - previous)
    return out, tl.where(some, base + tl.log(both), float("-inf"))
