"""Rows whose results somebody reads, as integers: of the layer before one of which only the first token is read, most are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd

from longnet.geometry.first_token import first_keys
from longnet.geometry.nests import Nest
from longnet.geometry.pattern import HeadOffsets, Pattern, head_offset


@dataclass(frozen=True)
class NeededRows:
    """Rows 0, r, 2r, ... below w, for each (w, r) of ``runs``."""

    runs: tuple[tuple[int, int], ...]

    def limit(self, first: int, step: int) -> int:
        """At or past which none of the rows ``first``, ``first + step``, ... is needed."""
        return max((end for end, rate in self.runs if first % gcd(step, rate) == 0), default=0)


def needed_by_first(pattern: Pattern, heads: int, length: int) -> NeededRows:
    """The rows that the first token attends to in some head."""
    return NeededRows(tuple((keys.end, keys.step) for keys in first_keys(pattern, heads, length)))


@lru_cache(maxsize=1024)
def swept_limits(
    nest: Nest, needed: NeededRows, head_offsets: HeadOffsets, heads: int, length: int
) -> tuple[tuple[int, ...], ...]:
    """By head and branch of a nest: at or past which none of the rows that the branch selects is needed, at most ``length``."""
    return tuple(
        tuple(
            min(length, _limit(nest, needed, head_offset(head_offsets, head, heads, rate), rate, length))
            for rate in nest.dilation_rates
        )
        for head in range(heads)
    )


def _limit(nest: Nest, needed: NeededRows, offset: int, rate: int, length: int) -> int:
    starts: Sequence[int] = [width for width in nest.segment_lengths if width < length]
    if any(width % gcd(rate, other) for width in starts for _, other in needed.runs):
        # Segments do not all begin at the same residue.
        return length
    return needed.limit(offset, rate)
