"""Where a program's rows lie and which ranges of the other side they meet: the kernels' view of ``geometry.nests``.

Everything is an integer or a vector of them; element offsets are 64 bits wide, positions 32. Tuples hold one value per
branch of the nest, finest first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class OwnedRows(NamedTuple):
    """The rows that a program owns: some, from ``first_row`` on, of the ``count`` of one class in one segment and head.

    The segment of the finest branch has ``size`` tokens from ``start`` on. Row i of the class stands at ``origin + i * step``.
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


class SweptRows(NamedTuple):
    """One range of the other side that owned rows meet: ``count`` rows of a branch, at ``first + i * step``."""

    branch: Any
    first: Any
    step: Any
    count: Any


@triton.jit
def pick(values, index, COUNT: tl.constexpr):
    """``values[index]`` for an index that is known only at run time."""
    found = values[0] + 0
    for i in tl.static_range(1, COUNT):
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
def locate(
    program, length, heads, segments, tiles, segment_lengths, class_level, class_inner, class_step, class_first,
    class_tiles, CLASSES: tl.constexpr, BLOCK: tl.constexpr, BLOCKED: tl.constexpr, LAST_FIRST: tl.constexpr,
):  # fmt: skip
    """(batch, head, segment start and length, level, first position, step, first row, rows) of a program.

    A program has ``BLOCK`` rows, from ``first row`` on, of one class in one segment of the finest branch. Programs that
    read the same segment are neighbours.
    """
    tile = program % tiles
    if LAST_FIRST:
        # The longest rows of a causal segment first, so that short programs fill the last wave.
        tile = tiles - 1 - tile
    rest = program // tiles
    start = rest % segments * segment_lengths[0]
    rest = rest // segments
    head = rest % heads
    batch = rest // heads
    level, inner, step, first, count = (
        class_level[0] + 0, class_inner[0] + 0, class_step[0] + 0, class_first[0] + 0, class_tiles[0] + 0,
    )  # fmt: skip
    for i in tl.static_range(1, CLASSES):
        inside = tile >= class_first[i]
        level = tl.where(inside, class_level[i], level)
        inner = tl.where(inside, class_inner[i], inner)
        step = tl.where(inside, class_step[i], step)
        first = tl.where(inside, class_first[i], first)
        count = tl.where(inside, class_tiles[i], count)
    tile -= first
    origin = (head_offset(head, step, heads, BLOCKED) + (1 + tile // count) * inner) % step
    size = tl.minimum(segment_lengths[0], length - start)
    rows = tl.cdiv(tl.maximum(size - origin, 0), step)
    return batch, head, start, size, level, start + origin, step, tile % count * BLOCK, rows


@triton.jit
def outer_range(
    index,
    start,
    length,
    head,
    heads,
    segment_lengths,
    rates,
    BRANCHES: tl.constexpr,
    CAUSAL: tl.constexpr,
    LATER: tl.constexpr,
    BLOCKED: tl.constexpr,
):
    """(branch, first position, step, count) of range ``index >= 1``: what branch ``i`` selects outside branch ``i - 1``.

    A causal query meets the range before the finer segment; a causal key (``LATER``) the one after it; otherwise both,
    in turn.
    """
    if CAUSAL:
        branch = index
        after = index < 0 if not LATER else index >= 0
    else:
        branch = (index + 1) // 2
        after = index % 2 == 0
    rate = pick(rates, branch, BRANCHES)
    width = pick(segment_lengths, branch, BRANCHES)
    finer = pick(segment_lengths, branch - 1, BRANCHES)
    low = start // width * width
    middle = start // finer * finer
    begin = tl.where(after, middle + finer, low)
    end = tl.where(after, tl.minimum(low + width, length), middle)
    offset = head_offset(head, rate, heads, BLOCKED)
    count = tl.cdiv(tl.maximum(end - begin - offset, 0), rate)
    return branch, begin + offset, rate, count


@triton.jit
def key_range(
    index, start, size, length, head, heads, row, first_row, last_row, segment_lengths, rates,
    BRANCHES: tl.constexpr, CAUSAL: tl.constexpr, BLOCKED: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """(branch, first position, step, whole, count, last) of the keys that a block of queries meets in range ``index``.

    The rows lie at the positions ``row``, from ``first_row`` to ``last_row``. Every row sees the first ``whole`` keys, a
    multiple of ``N``; no row sees more than ``count``, and each its own up to ``last``.
    """
    if index == 0:
        branch = 0
        step = rates[0] + 0
        first = start + head_offset(head, step, heads, BLOCKED)
        count = tl.cdiv(tl.maximum(start + size - first, 0), step)
        whole = count
        if CAUSAL:
            # Rows of a nest lie on the finest branch's keys, so positions compare as key indices.
            whole = tl.minimum(count, (first_row - first) // step + 1)
            count = tl.minimum(count, (last_row - first) // step + 1)
    else:
        branch, first, step, count = outer_range(
            index, start, length, head, heads, segment_lengths, rates, BRANCHES, CAUSAL, False, BLOCKED
        )
        whole = count
    last = tl.zeros_like(row) + (count - 1)
    if CAUSAL:
        last = tl.minimum(last, (row - first) // step)
    return branch, first, step, whole // N * N, count, last


@triton.jit
def range_weights(
    branch, step, level, head, heads, rates, BRANCHES: tl.constexpr, PERIOD: tl.constexpr, BLOCKED: tl.constexpr
):  # fmt: skip
    """log2 of the weights of one period of a range's rows against rows of ``level``."""
    offset = head_offset(head, step, heads, BLOCKED)
    return log2_weights(branch, offset, step, level, head, heads, rates, BRANCHES, PERIOD, BLOCKED)


@triton.jit
def log2_weights(
    branch, offset, step, level, head, heads, rates, BRANCHES: tl.constexpr, COUNT: tl.constexpr, BLOCKED: tl.constexpr
):
    """log2 of the weights of ``COUNT`` rows of a range against rows of ``level``; every block of the range has the same."""
    position = offset + tl.arange(0, COUNT) * step
    levels = tl.zeros([COUNT], tl.int32)
    for i in tl.static_range(BRANCHES):
        levels += ((position - head_offset(head, rates[i], heads, BLOCKED)) % rates[i] == 0).to(tl.int32)
    return tl.log2((tl.minimum(levels, level) - branch).to(tl.float32))


@triton.jit
def weighted_shift(weights, base, M: tl.constexpr, N: tl.constexpr, PERIOD: tl.constexpr):
    """``weights - base``, (M, N) from one period of column weights and a value per row.

    Spelt by periods, so that the compiler sees how few different values there are and computes each once.
    """
    shift = tl.broadcast_to(weights[None, None, :] - base[:, None, None], [M, N // PERIOD, PERIOD])
    return tl.reshape(shift, [M, N])
