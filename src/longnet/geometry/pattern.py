"""The pattern: which (segment length, dilation rate) branches, and each head's offset in them.

Source: LongNet, arXiv 2307.02486, sections 2.2 (dilation), 2.3 (mixture) and 2.4 (heads). Integers only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

HeadOffsets = Literal["interleaved", "blocked"]
HEAD_OFFSETS: tuple[str, ...] = get_args(HeadOffsets)


@dataclass(frozen=True)
class Branch:
    """One dilated attention: segments of ``segment_length`` tokens, of which every ``dilation_rate``-th is kept."""

    segment_length: int
    dilation_rate: int

    def rows(self, length: int, offset: int) -> int:
        """How many positions of a segment of ``length`` tokens a head with this ``offset`` selects."""
        return max(0, -(-(length - offset) // self.dilation_rate))


@dataclass(frozen=True)
class Pattern:
    """An ordered mixture of branches and the convention that gives every head its offset. Hashable."""

    branches: tuple[Branch, ...]
    head_offsets: HeadOffsets = "interleaved"

    @classmethod
    def parse(
        cls,
        segment_lengths: int | Sequence[int],
        dilation_rates: int | Sequence[int],
        head_offsets: str = "interleaved",
    ) -> Pattern:
        """Check what a user gave and build the pattern.

        Args:
            segment_lengths: tokens per segment, one int or one per branch.
            dilation_rates: the rate of each branch, ``1 <= rate <= segment length``.
            head_offsets: ``"interleaved"`` (head ``j`` has offset ``j mod r``, the paper) or ``"blocked"``
                (``j // ceil(H / r)``, torchscale's checkpoints).

        Raises:
            TypeError: a length or rate that is not an int.
            ValueError: lists that differ in length or are empty, a value below 1, a rate above its length,
                an unknown ``head_offsets``.
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
        for length, rate in zip(lengths, rates, strict=True):
            if rate > length:
                raise ValueError(
                    f"dilation_rates={rates} holds {rate}, more than its segment length {length} "
                    f"in segment_lengths={lengths}: expected rate <= length"
                )
        if head_offsets not in HEAD_OFFSETS:
            raise ValueError(f"head_offsets={head_offsets!r} is unknown: expected one of {HEAD_OFFSETS}")
        branches = tuple(Branch(length, rate) for length, rate in zip(lengths, rates, strict=True))
        return cls(branches, head_offsets)  # type: ignore[arg-type]

    @property
    def segment_lengths(self) -> tuple[int, ...]:
        return tuple(branch.segment_length for branch in self.branches)

    @property
    def dilation_rates(self) -> tuple[int, ...]:
        return tuple(branch.dilation_rate for branch in self.branches)

    @property
    def period(self) -> int:
        """The shortest distance after which every branch starts a new segment: no key is ever read across it."""
        return math.lcm(*self.segment_lengths)

    def offset(self, branch: Branch, head: int, heads: int) -> int:
        """The offset of ``head`` (of ``heads``) inside every segment of ``branch``."""
        if self.head_offsets == "interleaved":
            return head % branch.dilation_rate
        return head // -(-heads // branch.dilation_rate)

    def selects(self, branch: Branch, head: int, heads: int, position: int) -> bool:
        """Whether ``head`` takes part at the absolute ``position`` in ``branch``."""
        local = position % branch.segment_length
        return local % branch.dilation_rate == self.offset(branch, head, heads)


def _integers(name: str, values: int | Sequence[int]) -> tuple[int, ...]:
    items = (values,) if isinstance(values, int) else values
    try:
        items = tuple(items)
    except TypeError:
        raise TypeError(
            f"{name}={values!r} has type {type(values).__name__}: expected an int or a sequence of ints"
        ) from None
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int):
            raise TypeError(f"{name}={items!r} holds {item!r} of type {type(item).__name__}: expected ints")
    return items
