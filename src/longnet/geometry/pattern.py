"""The pattern: which branches, each head's offset in them, and what all of them share.

Source: LongNet, arXiv 2307.02486, sections 2.2 (dilation), 2.3 (mixture) and 2.4 (heads). Integers only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args, overload

from longnet.checks import check_flags, check_int, is_int
from longnet.geometry.rows import UNBOUNDED, Branch, Branches, T
from longnet.hashed import hash_once

HeadOffsets = Literal["interleaved", "blocked", "grouped"]
# Tokens, 2**40. Times the stride of a token (up to 2**22 elements) it fits into the 64 bits of torch's own strides.
LONGEST_SEGMENT = 1 << 40
# In this order: files store the index.
HEAD_OFFSETS: tuple[HeadOffsets, ...] = get_args(HeadOffsets)
PAPER_OFFSETS = HEAD_OFFSETS[:2]


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


class Beyond(NamedTuple):
    """An argument that LongNet's paper does not have, and its value.

    It becomes text when it is printed, not before: ``torch.compile`` cannot format a number that it holds as a symbol.
    """

    name: str
    value: int | None = None

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}={self.value}"


@hash_once
@dataclass(frozen=True)
class Pattern(Branches):
    """An ordered mixture of branches and the convention that gives every head its offset. Hashable.

    With ``head_numbers`` it is a pattern of these heads alone, as many as there are numbers.

    Args:
        window: one more branch: the keys at distances below it, without segments or dilation; None for none.
        dilated_queries: whether a branch's queries are the positions that it selects (the paper), or all.
        group: query heads that read one key/value head; for ``"grouped"`` offsets.
    """

    branches: tuple[Branch, ...]
    head_offsets: HeadOffsets = "interleaved"
    head_numbers: HeadNumbers | None = None
    window: int | None = None
    dilated_queries: bool = True
    group: int = 1

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
        branches = _branches(_integers("segment_lengths", segment_lengths), dilation_rates)
        pattern = cls(branches, _head_offsets(head_offsets, PAPER_OFFSETS))
        if not pattern.branches:
            raise ValueError("segment_lengths=() and dilation_rates=() are empty: expected at least one branch")
        if head_numbers is None:
            return pattern
        return replace(pattern, head_numbers=HeadNumbers.parse(head_numbers, total_heads))

    @classmethod
    def compose(
        cls,
        segment_lengths: int | Sequence[int | None] | None = (),
        dilation_rates: int | Sequence[int] = (),
        *,
        window: int | None = None,
        dilated_queries: bool = True,
        dilation_block: int = 1,
        head_offsets: str = "interleaved",
        head_numbers: Sequence[int] | None = None,
        total_heads: int = 0,
    ) -> Pattern:
        """A pattern beyond the paper: see :func:`longnet.dilated_attention` for the arguments, and :meth:`parse` for the last.

        Raises:
            TypeError, ValueError: as :meth:`parse`; also a ``window`` or ``dilation_block`` that is no int or below 1,
                ``dilated_queries`` that is no bool, one of these above ``LONGEST_SEGMENT``, and neither a branch nor a window.
        """
        if window is not None:
            _check_size("window", window)
        _check_size("dilation_block", dilation_block)
        check_flags(dilated_queries=dilated_queries)
        named = (None,) if segment_lengths is None else segment_lengths
        lengths = _integers("segment_lengths", named, or_none=True)
        branches = _branches(lengths, dilation_rates, dilation_block)
        for rate in (branch.dilation_rate for branch in branches):
            if rate * dilation_block > LONGEST_SEGMENT:
                raise ValueError(
                    f"dilation_block={dilation_block} times a rate of {rate}: expected at most {LONGEST_SEGMENT} tokens"
                )
        if not branches and window is None:
            raise ValueError(
                "segment_lengths=() and dilation_rates=() are empty and window=None: expected at least one branch, or a window"
            )
        numbers = None if head_numbers is None else HeadNumbers.parse(head_numbers, total_heads)
        return cls(branches, _head_offsets(head_offsets, HEAD_OFFSETS), numbers, window, dilated_queries)

    @property
    def beyond_paper(self) -> Beyond | None:
        """A part that LongNet's paper does not have, as it was asked for; None if all is the paper's."""
        return self.branches_beyond_paper if self.window is None else Beyond("window", self.window)

    @property
    def branches_beyond_paper(self) -> Beyond | None:
        """As :attr:`beyond_paper`, of all but the window."""
        if not self.dilated_queries:
            return Beyond("dilated_queries=False")
        for branch in self.branches:
            if branch.block > 1:
                return Beyond("dilation_block", branch.block)
            if branch.segment_length == UNBOUNDED:
                return Beyond("segment_lengths=None")
        return None if self.head_offsets in PAPER_OFFSETS else Beyond(f"head_offsets={self.head_offsets!r}")

    @property
    def options(self) -> dict[str, Any]:
        """What :meth:`compose` takes besides lengths and rates, by name: for whatever takes a pattern in these words."""
        return {
            "window": self.window,
            "dilated_queries": self.dilated_queries,
            "dilation_block": self.block,
            "head_offsets": self.head_offsets,
        }

    @property
    def block(self) -> int:
        """Tokens of a block of its branches."""
        return self.branches[0].block if self.branches else 1

    @property
    def has_grid(self) -> bool:
        """Whether it matters where segments and dilation begin."""
        return any(branch.grid_period > 1 for branch in self.branches)

    @property
    def rows_at_equal_steps(self) -> bool:
        """Whether the same rows are queries and keys of a branch, at equal steps: what a plan can express."""
        return self.dilated_queries and all(branch.block == 1 for branch in self.branches)

    @property
    def period(self) -> int:
        """The shortest distance after which every branch starts a new segment: no branch reads a key across it."""
        return math.lcm(*self.segment_lengths)

    @property
    def closed_period(self) -> int | None:
        """The period, if no key is ever read across it; None with a window or a segment without end."""
        return None if self.window is not None or UNBOUNDED in self.segment_lengths else self.period

    @property
    def longest_finite(self) -> int:
        """Tokens of the longest segment that ends; 0 if none does."""
        return max((length for length in self.given_lengths if length is not None), default=0)

    @property
    def shifted_offset(self) -> int:
        """The grid's offset in layers whose segments are to begin elsewhere: two thirds of the longest that ends."""
        return 2 * self.longest_finite // 3

    @property
    def farthest(self) -> int:
        """At least 1, and above every distance from a query to a key."""
        return max(*self.segment_lengths, self.window or 1, 1)

    def window_start(self, position: int, segment_offset: int = 0) -> int:
        """The last position up to this one, or 0, at which every branch starts a segment: no earlier key is read."""
        if self.closed_period is None:
            return 0
        return max(0, position - (position + segment_offset) % self.closed_period)

    def least_offset(self, segment_offset: int) -> int:
        """The least offset, from 0 on, that gives the same grid; the offset itself where the grid repeats too late."""
        period = math.lcm(*(branch.grid_period for branch in self.branches))
        return segment_offset % period if period <= LONGEST_SEGMENT else segment_offset

    def same_segments(self, position: int, other: int, segment_offset: int = 0) -> bool:
        """Whether both positions lie in one segment of every branch."""
        grids = ((branch, branch.origin(segment_offset)) for branch in self.branches)
        return all(branch.segment_number(position + c) == branch.segment_number(other + c) for branch, c in grids)

    def span(self, length: int) -> int:
        """At least 1, and above every distance from a query to a key in a sequence of ``length``."""
        return max(1, min(self.farthest, length))

    def read_span(self, branch: Branch | None, position: T, is_causal: bool, origin: int) -> tuple[T, T]:
        """The positions among which a query at ``position`` reads keys, of any sequence: (first, one past the last).

        Args:
            branch: one of the pattern's; None for its window.
            origin: what :meth:`Branch.origin` gives; a window has none.
        """
        if branch is None:
            assert self.window is not None
            return position - self.window + 1, position + (1 if is_causal else self.window)
        start, stop = branch.segment_start(position + origin), branch.segment_stop(position + origin)
        return start - origin, position + 1 if is_causal else stop - origin

    def of(self, *branches: Branch) -> Pattern:
        """These branches alone, for the same heads."""
        return replace(self, branches=branches, window=None)

    def shortened(self, length: int, segment_offset: int) -> Pattern:
        """What ``length`` tokens cannot tell from this pattern, with the shortest segments and window."""
        branches = tuple(branch.shortened(length, segment_offset) for branch in self.branches)
        window = None if self.window is None else min(self.window, length)
        return replace(self, branches=branches, window=window)

    def ended(self, length: int) -> Pattern:
        """What ``length`` tokens cannot tell from this pattern, with segments that end; the same for many lengths.

        Only branches whose queries and keys are the same rows change: then they are the paper's.
        """
        if not self.rows_at_equal_steps or UNBOUNDED not in self.segment_lengths:
            return self

        def end(branch: Branch) -> Branch:
            # One length for all sequences whose positions fit into 32 bits: kernels are compiled for it.
            least = max(length, branch.dilation_rate, 1 << 30)
            return replace(branch, segment_length=1 << (least - 1).bit_length())

        return replace(self, branches=tuple(end(b) if b.segment_length == UNBOUNDED else b for b in self.branches))

    def offset(self, branch: Branch, head: T, heads: int) -> T:
        """The offset of ``head`` (of ``heads``) inside every segment of ``branch``.

        Raises:
            ValueError: another number of heads than ``head_numbers`` names.
        """
        if self.head_numbers is not None:
            numbers = self.head_numbers.numbers
            if heads != len(numbers):
                raise ValueError(f"heads={heads}: expected the {len(numbers)} of head_numbers={numbers}")
            head, heads = numbers[head], self.head_numbers.total
        return head_offset(self.head_offsets, head, heads, branch.dilation_rate, self.group)

    def selects(self, branch: Branch, head: int, heads: int, position: int) -> bool:
        """Whether ``head`` takes part at the absolute ``position`` in ``branch``."""
        return branch.selects(position, self.offset(branch, head, heads))

    def grouped(self, heads: int, kv_heads: int) -> Pattern:
        """This pattern for ``heads`` query and ``kv_heads`` key/value heads; only ``"grouped"`` offsets depend on them.

        Raises:
            TypeError, ValueError: no ints of at least 1, or ``heads`` that ``kv_heads`` does not divide.
        """
        check_int("heads", heads, 1)
        if heads % check_int("kv_heads", kv_heads, 1):
            raise ValueError(f"heads={heads} is not divisible by kv_heads={kv_heads}: expected a divisor of heads")
        group = heads // kv_heads
        return self if group == self.group or self.head_offsets != "grouped" else replace(self, group=group)

    def times_read(
        self,
        head: T,
        query: T,
        key: T,
        *,
        heads: int,
        kv_heads: int | None = None,
        is_causal: bool = False,
        segment_offset: int = 0,
    ) -> T:
        """How often query position ``query`` of ``head`` reads ``key``: once for every branch that has both, and for the window.

        Args:
            head, query, key: ints, or arrays or tensors of ints that fit each other; then so is the result.
            heads: H.
            kv_heads: Hk, for ``"grouped"`` offsets; None for those of :meth:`grouped`, or else H.
            is_causal, segment_offset: as of :func:`longnet.dilated_attention`.
        """
        check_int("heads", heads, 1)
        check_int("segment_offset", segment_offset)
        pattern, times = self if kv_heads is None else self.grouped(heads, kv_heads), (key - query) * 0
        if self.window is not None:
            times = times + ((key - query < self.window) & (query - key < self.window))
        for branch in self.branches:
            origin, offset = branch.origin(segment_offset), pattern.offset(branch, head, heads)
            reads = branch.selects(key + origin, offset)
            if self.dilated_queries:
                reads = reads & branch.selects(query + origin, offset)
            if branch.segment_length != UNBOUNDED:
                reads = reads & (branch.segment_number(query + origin) == branch.segment_number(key + origin))
            times = times + reads
        return times * (key <= query) if is_causal else times

    def multiplicity(
        self, length: int, *, heads: int, kv_heads: int | None = None, is_causal: bool = False, segment_offset: int = 0
    ) -> list[list[list[int]]]:
        """The whole table of :meth:`times_read`, by head, query and key: for small lengths."""
        reads, place = self._reader(heads, kv_heads, is_causal, segment_offset), range(check_int("length", length, 0))
        return [[[int(reads(head, query, key)) for key in place] for query in place] for head in range(heads)]

    def mask_mod(
        self, *, heads: int, kv_heads: int | None = None, is_causal: bool = False, segment_offset: int = 0
    ) -> Callable[[Any, Any, Any, Any], Any]:
        """FlexAttention's ``mask_mod``: whether a query reads a key at all; arguments as of :meth:`times_read`.

        A key that is read ``m`` times counts as often: where branches share keys, add ``log(times_read)`` by a ``score_mod``.

        Raises:
            ValueError: with ``head_numbers``.
        """
        if self.head_numbers is not None:
            raise ValueError(f"head_numbers={self.head_numbers.numbers}: expected a pattern of all heads")
        reads = self._reader(heads, kv_heads, is_causal, segment_offset)

        def is_read(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return reads(head, query, key) > 0

        return is_read

    def _reader(
        self, heads: int, kv_heads: int | None, is_causal: bool, segment_offset: int
    ) -> Callable[[Any, Any, Any], Any]:
        """:meth:`times_read` of these heads, its arguments checked now."""
        pattern = self if kv_heads is None else self.grouped(heads, kv_heads)
        check_flags(is_causal=is_causal)
        options: dict[str, Any] = {"heads": heads, "is_causal": is_causal, "segment_offset": segment_offset}
        pattern.times_read(0, 0, 0, **options)
        return lambda head, query, key: pattern.times_read(head, query, key, **options)

    def readers(self, branch: Branch, heads: int, kv_heads: int) -> dict[tuple[int, int], list[int]]:
        """The query heads by (offset, the key/value head that they read): they read the same rows of keys."""
        readers: dict[tuple[int, int], list[int]] = {}
        for head in range(heads):
            key = self.offset(branch, head, heads), head // (heads // kv_heads)
            readers.setdefault(key, []).append(head)
        return readers


def head_offset(head_offsets: HeadOffsets, head: T, heads: int, rate: int, group: int = 1) -> T:
    """The first block of a segment that ``head`` (of ``heads``) selects at a dilation rate.

    Args:
        group: query heads that read one key/value head.
    """
    if head_offsets == "blocked":
        return head // -(-heads // rate)
    return (head if head_offsets == "interleaved" else head // group) % rate


def _check_size(name: str, value: int) -> None:
    if check_int(name, value, 1) > LONGEST_SEGMENT:
        raise ValueError(f"{name}={value}: expected at most {LONGEST_SEGMENT}")


def _head_offsets(head_offsets: str, known: tuple[HeadOffsets, ...]) -> HeadOffsets:
    for one in known:
        if one == head_offsets:
            return one
    raise ValueError(f"head_offsets={head_offsets!r} is unknown: expected one of {known}")


def _branches(
    lengths: tuple[int | None, ...], dilation_rates: int | Sequence[int], block: int = 1
) -> tuple[Branch, ...]:
    """Checked; a segment length of None is unbounded."""
    rates = _integers("dilation_rates", dilation_rates)
    if len(lengths) != len(rates):
        raise ValueError(
            f"segment_lengths={lengths} and dilation_rates={rates} differ in length: "
            f"expected one rate per segment length, got {len(lengths)} and {len(rates)}"
        )
    for name, values in (("segment_lengths", lengths), ("dilation_rates", rates)):
        for value in values:
            if value is not None and value < 1:
                raise ValueError(f"{name}={values} holds {value}: expected integers of at least 1")
            if value is not None and value > LONGEST_SEGMENT:
                raise ValueError(f"{name}={values} holds {value}: expected integers of at most {LONGEST_SEGMENT}")
    for length, rate in zip(lengths, rates, strict=True):
        if length is not None and rate > length:
            raise ValueError(
                f"dilation_rates={rates} holds {rate}, more than its segment length {length} "
                f"in segment_lengths={lengths}: expected rate <= length"
            )
    return tuple(
        Branch(UNBOUNDED if length is None else length, rate, block)
        for length, rate in zip(lengths, rates, strict=True)
    )


@overload
def _integers(name: str, values: int | Sequence[int]) -> tuple[int, ...]: ...


@overload
def _integers(name: str, values: int | Sequence[int | None], *, or_none: Literal[True]) -> tuple[int | None, ...]: ...


def _integers(name: str, values: int | Sequence[int | None], *, or_none: bool = False) -> tuple[int | None, ...]:
    items = (values,) if isinstance(values, int) else values
    try:
        # A text is a sequence too, of texts.
        if isinstance(items, (str, bytes)):
            raise TypeError
        items = tuple(items)
    except TypeError:
        raise TypeError(
            f"{name}={values!r} has type {type(values).__name__}: expected an int or a sequence of ints"
        ) from None
    for item in items:
        if not (is_int(item) or (or_none and item is None)):
            raise TypeError(f"{name}={items!r} holds {item!r} of type {type(item).__name__}: expected ints")
    return items
