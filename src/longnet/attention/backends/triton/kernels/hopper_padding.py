"""Padding masks in the Hopper kernels, in Gluon.

Padding costs time only where it is. :mod:`longnet.attention.backends.triton.kernels.count_padding` says whether tiles of keys
have any; where they have none they run as without a mask. Elsewhere a padded key gets a number beyond every query's last key:
the comparison that cuts the diagonal leaves it out too.

A probability of 0 times a NaN is NaN, and a padded token may be anything. So values and, in the backward pass, keys are read
through copies whose padded rows are 0. Where keys are owned, a padded one reaches no row but its own, which is written as 0.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from longnet.attention.backends.triton.kernels.count_padding import TOKENS
from longnet.attention.backends.triton.kernels.triton_internals import aggregate

# A number above those of all keys of a tile, and above the last that a query sees.
BEYOND = gl.constexpr(1 << 30)
# A value for each thread of a warpgroup.
LINEAR = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
COUNTED = gl.constexpr(TOKENS.value)


@aggregate
class Padding:
    """The mask (B, N) int8, padded tokens counted, and where a warpgroup's threads leave the keys' numbers for one another."""

    mask: gl.tensor
    counts: gl.tensor
    at: gl.tuple
    numbers: gl.shared_memory_descriptor

    @gluon.jit
    def is_near(self, block, keys, count, length):
        """Whether a token is padding near the first ``count`` keys of a range; it may be one that they step over."""
        last = gl.minimum(gl.maximum(keys.first + (count - 1) * keys.step, 0), length - 1)
        first = gl.minimum(keys.first, last)
        counts = self.counts + gl.cast(block.batch, gl.int64) * (gl.cdiv(length, COUNTED) + 1)
        return gl.load(counts + (last // COUNTED + 1)) != gl.load(counts + first // COUNTED)


@gluon.jit
def make_padding(PADDING, COUNTS, padding_at, C: gl.constexpr):
    """A warpgroup's :class:`Padding`, or nothing where there is no mask."""
    if C.PADDED:
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        return Padding(PADDING, COUNTS, padding_at, gl.allocate_shared_memory(gl.int32, [C.N], plain))
    else:
        return 0


@gluon.jit
def clear_of_padding(padding, block, keys, clear, length, C: gl.constexpr):
    """How many of the first ``clear`` tiles of a range run without the mask: all or none."""
    if C.PADDED:
        return gl.where(padding.is_near(block, keys, clear * C.N, length), 0, clear)
    else:
        return clear


@gluon.jit
def padding_of_tile(padding, block, keys, row, C: gl.constexpr):
    """Not 0 where keys of a tile, which begins at row ``row`` of a range, are padding. Read before it is waited for."""
    if C.PADDED:
        n = row + gl.arange(0, C.N, layout=LINEAR)
        token = gl.cast(keys.first + n * keys.step, gl.int64)
        rows = padding.mask + (gl.cast(block.batch, gl.int64) * padding.at[0] + token * padding.at[1])
        return gl.load(rows, mask=n < keys.count, other=0)
    else:
        return 0


@gluon.jit
def key_numbers(padding, padded, LAYOUT: gl.constexpr, C: gl.constexpr):
    """Numbers of a tile's keys, ``BEYOND`` where :func:`padding_of_tile` says that they are padding."""
    if C.PADDED:
        padding.numbers.store(gl.where(padded != 0, BEYOND, gl.arange(0, C.N, layout=LINEAR)))
        return padding.numbers.load(LAYOUT)
    else:
        return gl.arange(0, C.N, layout=LAYOUT)


@gluon.jit
def without_padded_rows(x, PADDING, padding_at, block, first, LAYOUT: gl.constexpr):
    """Rows (M, D) of a block, from number ``first`` on, with 0 where their token is padding."""
    m = first + gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    token = gl.cast(block.origin + m * block.step, gl.int64)
    rows = PADDING + (gl.cast(block.batch, gl.int64) * padding_at[0] + token * padding_at[1])
    padded = gl.load(rows, mask=m < block.count, other=0) != 0
    return gl.where(padded[:, None], 0.0, x)
