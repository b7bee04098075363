"""The rows of a branch: which segment holds a position, and which of its positions a head selects.

Source: LongNet, arXiv 2307.02486, section 2.2. All other files ask this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

# An int, or an array or tensor of ints.
T = TypeVar("T", int, Any)


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
    """One dilated attention: segments of ``segment_length`` tokens; a head selects every ``dilation_rate``-th token."""

    segment_length: int
    dilation_rate: int

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

    def spans(self, length: int) -> list[tuple[int, int, int]]:
        """The segments of ``length`` tokens, equally long ones together: (where the first begins, segments, tokens of each)."""
        whole, rest = divmod(length, self.segment_length)
        runs = ((0, whole, self.segment_length), (whole * self.segment_length, 1, rest))
        return [run for run in runs if run[1] and run[2]]

    def longest(self, length: int) -> int:
        """Tokens of the longest of these segments."""
        return min(self.segment_length, length)

    def rows(self, length: T, offset: int) -> T:
        """How many positions of a segment of ``length`` tokens a head with this ``offset`` selects."""
        return (length - offset + self.dilation_rate - 1) // self.dilation_rate

    def selects(self, position: Any, offset: int) -> Any:
        """Whether a head with this ``offset`` selects a position; for an array or tensor, as many answers."""
        return position % self.segment_length % self.dilation_rate == offset

    def selected(self, start: int, stop: int, offset: int) -> Rows:
        """What a head with this ``offset`` selects of the positions from ``start`` to ``stop``, all of one segment."""
        first, rate = start - start % self.segment_length + offset, self.dilation_rate
        number = -(-(start - first) // rate)
        return Rows(number, first + number * rate, rate, -(-(stop - first) // rate) - number)

    def is_aligned(self, position: int) -> bool:
        """Whether the offset 0 selects a position: a head then has the same offset after it as in the segment."""
        return position % self.segment_length % self.dilation_rate == 0

    def is_own_sequence(self, start: int, length: int | None) -> bool:
        """Whether a sequence that began at ``start`` would have the same rows. A ``length`` of None means that it never ends."""
        if start == self.segment_start(start):
            return True
        return length is not None and self.is_aligned(start) and start + length <= self.segment_stop(start)


class Branches:
    """What several ``branches`` have, as lists."""

    branches: tuple[Branch, ...]

    @property
    def segment_lengths(self) -> tuple[int, ...]:
        return tuple(branch.segment_length for branch in self.branches)

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
