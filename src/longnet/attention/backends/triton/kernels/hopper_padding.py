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
    """The mask (B, N) int8, its counted tokens, and where a warpgroup's threads leave keys' numbers for one another."""

    mask: gl.tensor
    counts: gl.tensor
    at: gl.tuple
    numbers: gl.shared_memory_descriptor

    @gluon.jit
    def is_near(self, batch, first, last, length):
        """Whether a token from ``first`` to ``last`` may be padding, of those that there are."""
        last = gl.minimum(gl.maximum(last, 0), length - 1)
        first = gl.minimum(gl.maximum(first, 0), last)
        counts = self.counts + gl.cast(batch, gl.int64) * (gl.cdiv(length, COUNTED) + 1)
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
        last = keys.first + (clear * C.N - 1) * keys.step
        return gl.where(padding.is_near(block.batch, keys.first, last, length), 0, clear)
    else:
        return clear


@gluon.jit
def padding_at_tokens(MASK, at, batch, token, there):
    """Not 0 where tokens of a mask (B, N) with the strides ``at`` are padding; 0 where they are not ``there``."""
    rows = MASK + (gl.cast(batch, gl.int64) * at[0] + gl.cast(token, gl.int64) * at[1])
    return gl.load(rows, mask=there, other=0)


@gluon.jit
def padding_of_tile(padding, block, keys, row, C: gl.constexpr):
    """Of a tile's keys, which begins at row ``row`` of a range. To be read before the tile is waited for."""
    if C.PADDED:
        n = row + gl.arange(0, C.N, layout=LINEAR)
        return padding_at_tokens(padding.mask, padding.at, block.batch, keys.first + n * keys.step, n < keys.count)
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
def without_padding(x, MASK, at, batch, token, there):
    """Rows (M, D) of tokens, with 0 where these are padding."""
    padded = gl.convert_layout(padding_at_tokens(MASK, at, batch, token, there), gl.SliceLayout(1, x.type.layout))
    return gl.where((padded != 0)[:, None], 0.0, x)
