"""What is beyond the paper as launches of the band kernels: integers only, cached.

A branch whose queries are all positions is a band of one launch, together with the window: one softmax runs through them. A
branch whose queries are its own rows is a launch of its own, where it is not the paper's: those are nests.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from longnet.geometry import HEAD_OFFSETS, Branch, Pattern
from longnet.geometry.rows import UNBOUNDED
from longnet.hashed import hash_once

# Positions on a grid are 32 bits wide in kernels.
LARGEST_POSITION = 1 << 30


class BandSizes(NamedTuple):
    """The numbers of one launch.

    Args:
        group: query heads of a key head.
        tiles: blocks of rows of one head.
        segment_offset: of the grid, where it is one for all rows of the batch.
    """

    length: int
    heads: int
    group: int
    scale: float
    tiles: int
    segment_offset: int


@dataclass(frozen=True)
class BandSettings:
    """What a kernel is compiled for.

    Args:
        D, D_BLOCK: channels, and the power of two that they are loaded as.
        M, N: rows of queries and of keys at a time.
        STAGES: of the pipeline.
        BANDS: how many; the next four say what each is, see ``kernels.bands``.
        ROWS_OF: the band whose rows are the queries; -1 for all positions.
        HEAD_OFFSETS: a number of ``longnet.geometry.HEAD_OFFSETS``.
        GROUP: neighbouring heads that have the same offset, where offsets are grouped. It is the pattern's: in a call where heads
            were dropped, fewer query heads may read one key head.
        BY_ROW: an offset of the grid for each row of the batch.
        MERGE: earlier launches have written these rows already, so results are mixed in.
    """

    D: int
    D_BLOCK: int
    M: int
    N: int
    STAGES: int
    BANDS: int
    LENGTHS: tuple[int, ...]
    RATES: tuple[int, ...]
    BLOCKS: tuple[int, ...]
    WINDOWS: tuple[int, ...]
    ROWS_OF: int
    HEAD_OFFSETS: int
    GROUP: int
    BY_ROW: bool
    CAUSAL: bool
    PADDED: bool
    MERGE: bool
    PRECISION: str


@hash_once
@dataclass(frozen=True)
class BandLaunch:
    """The bands of one softmax. ``branch`` is the one whose rows are the queries, None for all positions."""

    bands: tuple[Branch | int, ...]
    branch: Branch | None

    def rows(self, length: int) -> int:
        """At least as many as there are queries of a head."""
        return length if self.branch is None else self.branch.most_rows(length)

    def constants(self, pattern: Pattern) -> dict[str, Any]:
        """Its part of :class:`BandSettings`."""
        branches = [Branch(UNBOUNDED, 1) if isinstance(band, int) else band for band in self.bands]
        return {
            "BANDS": len(self.bands),
            "LENGTHS": tuple(0 if one.segment_length == UNBOUNDED else one.segment_length for one in branches),
            "RATES": tuple(one.dilation_rate for one in branches),
            "BLOCKS": tuple(one.block for one in branches),
            "WINDOWS": tuple(min(band, LARGEST_POSITION) if isinstance(band, int) else 0 for band in self.bands),
            "ROWS_OF": -1 if self.branch is None else 0,
            "HEAD_OFFSETS": HEAD_OFFSETS.index(pattern.head_offsets),
            "GROUP": pattern.group,
        }

    @property
    def block(self) -> int:
        """Tokens of a block of the first band."""
        return 1 if isinstance(self.bands[0], int) else self.bands[0].block

    @cached_property
    def by_band(self) -> tuple[BandLaunch, ...]:
        """A launch for each band: those that own keys."""
        return tuple(replace(self, bands=(band,)) for band in self.bands)

    def covers(self, of_keys: bool) -> bool:
        """Whether every position is a query or, of the first band, a key."""
        first = self.bands[0]
        return (isinstance(first, int) or first.dilation_rate == 1) if of_keys else self.branch is None

    def keys(self, length: int) -> int:
        """At least as many as there are keys of a head, of a single band."""
        (band,) = self.bands
        return length if isinstance(band, int) else band.most_rows(length)


@lru_cache(maxsize=256)
def band_launches(pattern: Pattern, with_branches: bool) -> tuple[BandLaunch, ...]:
    """In the order in which they are to run; those of all positions first, which write every row.

    Args:
        with_branches: whether branches whose rows are queries and keys are bands too, or left to other kernels.
    """
    window = () if pattern.window is None else (pattern.window,)
    if not pattern.dilated_queries:
        # The window first: it writes the gradient of every key.
        return (BandLaunch((*window, *pattern.branches), None),)
    launches = [BandLaunch(window, None)] if window else []
    if with_branches:
        launches += [BandLaunch((branch,), branch) for branch in pattern.branches]
    return tuple(launches)


@lru_cache(maxsize=1024)
def unsupported_reason(pattern: Pattern, length: int) -> str | None:
    """Why the band kernels cannot run, or None when they can."""
    finite = [one for one in pattern.segment_lengths if one != UNBOUNDED]
    largest = max((length, *finite, *(one.dilation_rate * one.block for one in pattern.branches)))
    if largest > LARGEST_POSITION:
        return f"N, segment_lengths and dilation_rates times dilation_block may be {LARGEST_POSITION} at most, not {largest}"
    return None
