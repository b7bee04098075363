"""The rows of a branch: which segment holds a position, and which of its positions a head selects.

Source: LongNet, arXiv 2307.02486, section 2.2. All other files ask this one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

# An int, or an array or tensor of ints.
T = TypeVar("T", int, Any)

# The length of a segment that never ends: above any sequence's, and an int64.
UNBOUNDED = 1 << 62


class Rows(NamedTuple):
    """The rows that one head selects in a part of a segment.

    Args:
        number: how many rows of the segment come before them.
        first: the position of the first.
        step: tokens from row to row.
        size: how many they are.
    """

    number: int
    first: int
    step: int
    size: int

    @property
    def positions(self) -> range:
        return range(self.first, self.first + self.size * self.step, self.step)

    def tokens(self, start: int) -> slice:
        """The rows as an index of tokens that begin at position ``start``."""
        return slice(self.first - start, self.first - start + self.size * self.step, self.step)


@dataclass(frozen=True)
class Branch:
    """One dilated attention: segments of ``segment_length`` tokens; of every ``dilation_rate`` blocks a head selects one.

    Args:
        segment_length: tokens, or ``UNBOUNDED``.
        block: tokens of a block; 1 in the paper. What counts single rows (:meth:`rows`, :meth:`selected` and the plans made of
            them) is for blocks of one token.
    """

    segment_length: int
    dilation_rate: int
    block: int = 1

    def origin(self, segment_offset: T) -> T:
        """Where token 0 stands on the grid when position ``p`` counts as ``p + segment_offset``; at least 0."""
        return segment_offset % self.grid_period

    @property
    def grid_period(self) -> int:
        """Tokens after which its grid repeats."""
        return self.dilation_rate * self.block if self.segment_length == UNBOUNDED else self.segment_length

    def shortened(self, length: int, segment_offset: int) -> Branch:
        """The branch of the shortest segments that ``length`` tokens cannot tell from this one."""
        stop = segment_offset + length
        if self.segment_length == UNBOUNDED or not 0 <= segment_offset < stop < self.segment_length:
            return self
        return replace(self, segment_length=max(self.dilation_rate, stop))

    def segment_number(self, position: T) -> T:
        """Which segment holds a position."""
        return position // self.segment_length

    def segment_start(self, position: T) -> T:
        """Where the segment that holds a position begins."""
        return position - position % self.segment_length

    def segment_stop(self, position: T) -> T:
        """Where the segment after it begins."""
        return position - position % self.segment_length + self.segment_length

    def starts(self, length: int) -> range:
        """Where the segments of ``length`` tokens begin."""
        return range(0, length, self.segment_length)

    def spans(self, length: int, origin: int = 0) -> list[tuple[int, int, int]]:
        """The segments of ``length`` tokens from ``origin`` on, equally long ones together.

        Returns:
            (where the first begins on the grid, segments, tokens of each).
        """
        begun = min(length, -origin % self.segment_length)
        whole, rest = divmod(length - begun, self.segment_length)
        after = origin + begun
        runs = ((origin, 1, begun), (after, whole, self.segment_length), (after + whole * self.segment_length, 1, rest))
        return [run for run in runs if run[1] and run[2]]

    def longest(self, length: int) -> int:
        """Tokens of the longest of these segments."""
        return min(self.segment_length, length)

    def rows(self, length: T, offset: int) -> T:
        """How many positions of a segment of ``length`` tokens a head with this ``offset`` selects."""
        return (length - offset + self.dilation_rate - 1) // self.dilation_rate

    def chosen(self, tokens: int, offset: int) -> tuple[int, int]:
        """(how many of a segment's first tokens a head with this ``offset`` selects, the sum of their places); any block."""
        block, cycle = self.block, self.dilation_rate * self.block
        whole, rest = divmod(tokens, cycle)
        start = offset * block
        last = min(max(rest - start, 0), block)
        places = block * (cycle * (whole * (whole - 1) // 2) + whole * start) + whole * (block * (block - 1) // 2)
        return whole * block + last, places + last * (whole * cycle + start) + last * (last - 1) // 2

    def kept(self, offset: int, tokens: int) -> int:
        """The most positions that a head with this ``offset`` selects of a segment; of ``tokens`` tokens where it never ends."""
        if self.segment_length != UNBOUNDED:
            return self.chosen(self.segment_length, offset)[0]
        cycle = self.dilation_rate * self.block
        return tokens // cycle * self.block + min(tokens % cycle, self.block)

    def kept_rows(self, position: int, offset: int, origin: int) -> tuple[int, int]:
        """Which rows, from the first to before the last, hold what was read of a segment: all selected before ``position``.

        A segment's rows are numbered from its start on the grid; those of a segment without end from token 0 on.

        Args:
            origin: where token 0 stands on the grid.
        """
        start, first = self.segment_start(position + origin), self.first_row(offset, origin)
        low, high = (self.chosen(max(at - start, 0), offset)[0] for at in (origin, position + origin))
        return low - first, high - first

    def first_row(self, offset: int, origin: int) -> int:
        """The number, counted from the start of the grid, of what :meth:`kept_rows` counts as row 0."""
        return self.chosen(origin, offset)[0] if self.segment_length == UNBOUNDED else 0

    def place_of(self, position: T) -> T:
        """Where in its segment a position on the grid stands."""
        return position - self.segment_start(position)

    def chosen_before(self, place: Any, offset: Any) -> Any:
        """How many positions of a segment a head with this ``offset`` selects before a place in it: tensors, any block."""
        cycle = place // (self.dilation_rate * self.block)
        return cycle * self.block + (place - (cycle * self.dilation_rate + offset) * self.block).clamp(0, self.block)

    def place_of_row(self, number: T, offset: int) -> T:
        """Where in its segment the row stands that a head selects, by its number: the inverse of :meth:`chosen_before`."""
        cycle = number // self.block
        return (cycle * self.dilation_rate + offset) * self.block + number - cycle * self.block

    def count(self, start: int, stop: int, offset: int) -> int:
        """How many positions from ``start`` to ``stop``, all of one segment, a head selects; any block."""
        before = self.segment_start(start)
        return self.chosen(max(start, stop) - before, offset)[0] - self.chosen(start - before, offset)[0]

    def most_rows(self, tokens: int) -> int:
        """An upper bound of the rows that a head selects of ``tokens`` tokens, for every offset of the grid and any block."""
        cycle = self.dilation_rate * self.block
        if self.segment_length == UNBOUNDED:
            return min(tokens, (tokens // cycle + 2) * self.block)
        each = min(self.segment_length, (self.segment_length // cycle + 1) * self.block)
        return min(tokens, (tokens // self.segment_length + 2) * each)

    def selects(self, position: Any, offset: int) -> Any:
        """Whether a head with this ``offset`` selects a position; for an array or tensor, as many answers."""
        local = position if self.segment_length == UNBOUNDED else position % self.segment_length
        return local // self.block % self.dilation_rate == offset

    def selected(self, start: int, stop: int, offset: int) -> Rows:
        """What a head with this ``offset`` selects of the positions from ``start`` to ``stop``, all of one segment."""
        first, rate = start - start % self.segment_length + offset, self.dilation_rate
        number = -(-(start - first) // rate)
        return Rows(number, first + number * rate, rate, -(-(stop - first) // rate) - number)

    def is_aligned(self, position: int) -> bool:
        """Whether the offset 0 selects a position: a head then has the same offset after it as in the segment."""
        return position % self.segment_length % self.dilation_rate == 0

    def is_own_sequence(self, start: int, length: int | None, segment_offset: int = 0) -> bool:
        """Whether a sequence that began at ``start`` would have the same rows on its own grid, which is offset alike.

        A ``length`` of None means that it never ends.
        """
        if self.origin(start) == 0:
            return True
        if self.segment_length == UNBOUNDED:
            return False
        alone, moved = (position % self.segment_length for position in (segment_offset, segment_offset + start))
        is_inside = length is not None and max(alone, moved) + length <= self.segment_length
        return is_inside and (moved - alone) % (self.dilation_rate * self.block) == 0


class Branches:
    """What several ``branches`` have, as lists."""

    branches: tuple[Branch, ...]

    @property
    def segment_lengths(self) -> tuple[int, ...]:
        return tuple(branch.segment_length for branch in self.branches)

    @property
    def given_lengths(self) -> tuple[int | None, ...]:
        """The segment lengths as a user writes them: None for a segment without end."""
        return tuple(None if length == UNBOUNDED else length for length in self.segment_lengths)

    @property
    def block(self) -> int:
        """Tokens of a block: one number for all branches, 1 without any."""
        return max((branch.block for branch in self.branches), default=1)

    @property
    def dilation_rates(self) -> tuple[int, ...]:
        return tuple(branch.dilation_rate for branch in self.branches)

    @property
    def grid(self) -> tuple[tuple[int, ...], ...]:
        """What :func:`locate` takes, by branch."""
        return self.segment_lengths, self.dilation_rates


def row_count(tokens: T, rate: T | int) -> T:
    """How many of the tokens 0, rate, 2 rate, ... there are below ``tokens``, which is above ``-rate``."""
    return (tokens + rate - 1) // rate


def locate(position: T, lengths: T, rates: T) -> tuple[T, T, T]:
    """(the offset that selects a position, the number of its row, where row 0 of this offset stands in the segment)."""
    local = position % lengths
    number = local // rates
    offset = local - number * rates
    return offset, number, position - local + offset
