"""The pattern: which branches, each head's offset in them, and what all of them share.

Source: LongNet, arXiv 2307.02486, sections 2.2 (dilation), 2.3 (mixture) and 2.4 (heads). Integers only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from longnet.checks import is_int
from longnet.geometry.rows import Branch, Branches

HeadOffsets = Literal["interleaved", "blocked"]
# Tokens, 2**40. Times the stride of a token (up to 2**22 elements) it fits into the 64 bits of torch's own strides.
LONGEST_SEGMENT = 1 << 40
HEAD_OFFSETS: tuple[HeadOffsets, ...] = get_args(HeadOffsets)


@dataclass(frozen=True)
class HeadNumbers:
    """Some heads of ``total``, by number, in rising order: a call's head ``j`` has the offsets of head ``numbers[j]``.

    So heads that are left when others have been pruned still select what they selected.
    """

    numbers: tuple[int, ...]
    total: int

    @classmethod
    def parse(cls, numbers: Sequence[int], total: int) -> HeadNumbers:
        """Check what a user gave.

        Raises:
            TypeError: numbers that are no ints. ValueError: none, or not rising, or out of range.
        """
        numbers = _integers("head_numbers", numbers)
        if not numbers or any(a >= b for a, b in pairwise((-1, *numbers, total))):
            raise ValueError(
                f"head_numbers={numbers}: expected at least one of the heads 0 to {total - 1}, each once, in rising order"
            )
        return cls(numbers, total)

    def kv_heads(self, kv_heads: int) -> int:
        """How many of ``kv_heads`` key/value heads these heads read, which must do so in whole groups.

        Raises:
            ValueError: heads of a key/value head that others of its group miss.
        """
        group = self.total // kv_heads
        read = {head // group for head in self.numbers}
        if len(read) * group != len(self.numbers):
            raise ValueError(
                f"head_numbers={self.numbers} with kv_heads={kv_heads} of {self.total} heads: expected all {group} heads "
                "of a key/value head, or none of them"
            )
        return len(read)


@dataclass(frozen=True)
class Pattern(Branches):
    """An ordered mixture of branches and the convention that gives every head its offset. Hashable.

    With ``head_numbers`` it is a pattern of these heads alone, as many as there are numbers.
    """

    branches: tuple[Branch, ...]
    head_offsets: HeadOffsets = "interleaved"
    head_numbers: HeadNumbers | None = None

    @classmethod
    def parse(
        cls,
        segment_lengths: int | Sequence[int],
        dilation_rates: int | Sequence[int],
        head_offsets: str = "interleaved",
        head_numbers: Sequence[int] | None = None,
        total_heads: int = 0,
    ) -> Pattern:
        """Check what a user gave and build the pattern.

        Args:
            segment_lengths: tokens per segment, one int or one per branch, at most ``LONGEST_SEGMENT``.
            dilation_rates: the rate of each branch, ``1 <= rate <= segment length``.
            head_offsets: ``"interleaved"`` (head ``j`` has offset ``j mod r``, the paper) or ``"blocked"``
                (``j // ceil(H / r)``, torchscale's checkpoints).
            head_numbers: the numbers, of ``total_heads``, of the heads that there are; None for all of any number of heads.

        Raises:
            TypeError: a length, rate or number that is not an int.
            ValueError: lists that differ in length or are empty, a value below 1 or above ``LONGEST_SEGMENT``, a rate above
                its length,
                an unknown ``head_offsets``, numbers that do not rise or are out of range.
        """
        lengths = _integers("segment_lengths", segment_lengths)
        rates = _integers("dilation_rates", dilation_rates)
        if len(lengths) != len(rates):
            raise ValueError(
                f"segment_lengths={lengths} and dilation_rates={rates} differ in length: "
                f"expected one rate per segment length, got {len(lengths)} and {len(rates)}"
            )
        if not lengths:
            raise ValueError("segment_lengths=() and dilation_rates=() are empty: expected at least one branch")
        for name, values in (("segment_lengths", lengths), ("dilation_rates", rates)):
            for value in values:
                if value < 1:
                    raise ValueError(f"{name}={values} holds {value}: expected integers of at least 1")
                if value > LONGEST_SEGMENT:
                    raise ValueError(f"{name}={values} holds {value}: expected integers of at most {LONGEST_SEGMENT}")
        for length, rate in zip(lengths, rates, strict=True):
            if rate > length:
                raise ValueError(
                    f"dilation_rates={rates} holds {rate}, more than its segment length {length} "
                    f"in segment_lengths={lengths}: expected rate <= length"
                )
        if head_offsets not in HEAD_OFFSETS:
            raise ValueError(f"head_offsets={head_offsets!r} is unknown: expected one of {HEAD_OFFSETS}")
        branches = tuple(Branch(length, rate) for length, rate in zip(lengths, rates, strict=True))
        numbers = None if head_numbers is None else HeadNumbers.parse(head_numbers, total_heads)
        return cls(branches, head_offsets, numbers)

    @property
    def period(self) -> int:
        """The shortest distance after which every branch starts a new segment: no key is ever read across it."""
        return math.lcm(*self.segment_lengths)

    def window_start(self, position: int) -> int:
        """The last position up to this one at which every branch starts a segment: no earlier key is read."""
        return position - position % self.period

    def same_segments(self, position: int, other: int) -> bool:
        """Whether both positions lie in one segment of every branch."""
        return all(branch.segment_number(position) == branch.segment_number(other) for branch in self.branches)

    def span(self, length: int) -> int:
        """The most tokens of a sequence of ``length`` that lie in one segment, at least 1: distances in it are below."""
        return max(1, min(max(self.segment_lengths), length))

    def of(self, *branches: Branch) -> Pattern:
        """These branches alone, for the same heads."""
        return Pattern(branches, self.head_offsets, self.head_numbers)

    def offset(self, branch: Branch, head: int, heads: int) -> int:
        """The offset of ``head`` (of ``heads``) inside every segment of ``branch``.

        Raises:
            ValueError: another number of heads than ``head_numbers`` names.
        """
        if self.head_numbers is not None:
            numbers = self.head_numbers.numbers
            if heads != len(numbers):
                raise ValueError(f"heads={heads}: expected the {len(numbers)} of head_numbers={numbers}")
            head, heads = numbers[head], self.head_numbers.total
        return head_offset(self.head_offsets, head, heads, branch.dilation_rate)

    def selects(self, branch: Branch, head: int, heads: int, position: int) -> bool:
        """Whether ``head`` takes part at the absolute ``position`` in ``branch``."""
        return branch.selects(position, self.offset(branch, head, heads))

    def readers(self, branch: Branch, heads: int, kv_heads: int) -> dict[tuple[int, int], list[int]]:
        """The query heads by (offset, the key/value head that they read): they read the same rows of keys."""
        readers: dict[tuple[int, int], list[int]] = {}
        for head in range(heads):
            key = self.offset(branch, head, heads), head // (heads // kv_heads)
            readers.setdefault(key, []).append(head)
        return readers


def head_offset(head_offsets: HeadOffsets, head: int, heads: int, rate: int) -> int:
    """The first row of a segment that ``head`` (of ``heads``) selects at a dilation rate."""
    if head_offsets == "interleaved":
        return head % rate
    return head // -(-heads // rate)


def _integers(name: str, values: int | Sequence[int]) -> tuple[int, ...]:
    items = (values,) if isinstance(values, int) else values
    try:
        items = tuple(items)
    except TypeError:
        raise TypeError(
            f"{name}={values!r} has type {type(values).__name__}: expected an int or a sequence of ints"
        ) from None
    for item in items:
        if not is_int(item):
            raise TypeError(f"{name}={items!r} holds {item!r} of type {type(item).__name__}: expected ints")
    return items
