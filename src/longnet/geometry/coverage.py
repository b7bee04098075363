"""Positions that heads take part in, and those that none does.

Source: LongNet, arXiv 2307.02486, section 2.4 (heads shift the selection). Integers and fractions only; sets of positions are
Python integers, bit ``p`` for position ``p``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from longnet.checks import check_int
from longnet.geometry.cost import digit_steps
from longnet.geometry.pattern import Pattern
from longnet.geometry.reach import Offsets, offsets_taken, repeat_bits
from longnet.geometry.rows import UNBOUNDED, Branch

_DIGIT_STEPS = 1 << 20
# Tokens after which blocks of several tokens repeat.
_LONGEST_CYCLE = 1 << 14
_MASK_BITS = 1 << 26


@dataclass(frozen=True)
class Uncovered:
    """Positions that nothing takes part at. False when there are none."""

    count: int
    positions: int
    description: str

    def __bool__(self) -> bool:
        return self.count > 0

    @property
    def fraction(self) -> Fraction:
        return Fraction(self.count, self.positions)


@dataclass(frozen=True)
class Coverage:
    """Coverage of a pattern: ``heads[j]`` is what no branch of head ``j`` reaches, ``uncovered`` what no head reaches.

    A query that its head does not cover gets a zero output from that head; one that no head covers gets nothing at all.
    """

    heads: tuple[Uncovered, ...]
    uncovered: Uncovered

    @property
    def fractions(self) -> tuple[Fraction, ...]:
        """The fraction of positions that each head covers."""
        return tuple(1 - head.fraction for head in self.heads)


def coverage(pattern: Pattern, heads: int, length: int | None = None) -> Coverage:
    """Which positions each head, and all heads together, take part at. Exact.

    Args:
        pattern: the branches.
        heads: query heads H.
        length: tokens N; None for the endless sequence, counted over one repetition of the selection.

    Raises:
        TypeError, ValueError: ``heads`` or ``length`` no int or below 1; as in :func:`uncovered_positions`.
    """
    per_offsets: dict[tuple[Offsets, ...], Uncovered] = {}
    per_head = []
    for head in range(check_int("heads", heads, 1)):
        offsets = [pattern.offset(branch, head, heads) for branch in pattern.branches]
        taken = tuple((offset,) for offset in offsets)
        if taken not in per_offsets:
            per_offsets[taken] = _uncovered(pattern, taken, length)
        per_head.append(per_offsets[taken])
    return Coverage(tuple(per_head), uncovered_positions(pattern, heads, length))


def uncovered_positions(pattern: Pattern, heads: int, length: int | None = None) -> Uncovered:
    """The positions that no head covers in any branch, counted exactly and described in words.

    One branch of rate 8 with 6 heads leaves ``"positions p with p mod 8 in {6, 7}"``. A branch whose rate divides its
    segment length selects by ``p mod r`` alone; the others need ``p mod w mod r``. Those others are counted digit by
    digit when their segment lengths divide one another (any length, at once), and with a bit mask otherwise.

    Args:
        pattern, heads, length: as in :func:`coverage`.

    Raises:
        ValueError: segment lengths that neither nest nor repeat within 2**26 positions; blocks that repeat only after more than
            16,384 tokens.
    """
    check_int("heads", heads, 1)
    taken = tuple(offsets_taken(pattern, branch, heads) for branch in pattern.branches)
    return _uncovered(pattern, taken, length)


def _uncovered(pattern: Pattern, taken: tuple[Offsets, ...], length: int | None) -> Uncovered:
    if pattern.window is not None:
        return Uncovered(0, 1 if length is None else check_int("length", length, 1), "no positions")
    aligned: list[tuple[Branch, Offsets]] = []
    shifted: list[tuple[Branch, Offsets]] = []
    for branch, offsets in (_of_single_tokens(*pair) for pair in zip(pattern.branches, taken, strict=True)):
        # A segment that ends past the sequence never restarts the count either.
        single = length is not None and length <= branch.segment_length
        (aligned if single or branch.segment_length % branch.dilation_rate == 0 else shifted).append((branch, offsets))
    aligned = [(Branch(branch.dilation_rate, branch.dilation_rate), offsets) for branch, offsets in aligned]
    period = math.lcm(*(branch.segment_length for branch, _ in aligned + shifted))
    positions = period if length is None else check_int("length", length, 1)
    count = 0
    if all(len(offsets) < branch.dilation_rate for branch, offsets in aligned + shifted):
        count = _count(aligned, shifted, period, positions)
    return Uncovered(count, positions, _describe(aligned + shifted) if count else "no positions")


def _of_single_tokens(branch: Branch, offsets: Offsets) -> tuple[Branch, Offsets]:
    """The same positions by blocks of one token, from a segment that ends."""
    rate = branch.dilation_rate * branch.block
    if branch.block > 1 and rate > _LONGEST_CYCLE:
        raise ValueError(
            f"dilation_block={branch.block} times a rate of {branch.dilation_rate} is too long to count: "
            f"expected at most {_LONGEST_CYCLE} tokens"
        )
    tokens = tuple(offset * branch.block + token for offset in offsets for token in range(branch.block))
    return Branch(rate if branch.segment_length == UNBOUNDED else branch.segment_length, rate), tokens


def _count(
    aligned: list[tuple[Branch, Offsets]], shifted: list[tuple[Branch, Offsets]], period: int, positions: int
) -> int:
    """Positions below ``positions`` that no branch takes."""
    chain = sorted(shifted, key=lambda entry: entry[0].segment_length)
    common = math.lcm(*(branch.dilation_rate for branch, _ in aligned + shifted))
    if digit_steps([branch for branch, _ in chain], common) <= _DIGIT_STEPS:
        return _count_by_digits(aligned, chain, common, positions)
    if min(period, positions) > _MASK_BITS:
        raise ValueError(
            f"(segment length, rate) {[(b.segment_length, b.dilation_rate) for b, _ in aligned + chain]} select the "
            f"same positions again only after {period}: expected segment lengths that are multiples of their rates or "
            f"of one another, rates with a small common multiple, or at most {_MASK_BITS} positions to go through"
        )

    def count(size: int) -> int:
        covered = 0
        for branch, offsets in aligned + shifted:
            segment = 0
            for offset in offsets:
                segment |= repeat_bits(1, branch.dilation_rate, min(branch.segment_length, size) - offset) << offset
            covered |= repeat_bits(segment, branch.segment_length, size)
        return size - covered.bit_count()

    whole, rest = divmod(positions, period)
    return (whole * count(period) if whole else 0) + (count(rest) if rest else 0)


def _count_by_digits(
    aligned: list[tuple[Branch, Offsets]], chain: list[tuple[Branch, Offsets]], common: int, positions: int
) -> int:
    """As :func:`_count` for nested segments: a position's digits count whole segments inside the next longer one."""

    @cache
    def count(level: int, residue: int, size: int) -> int:
        """Local positions u < size of a segment of this level with u = residue mod M that no inner branch takes."""
        if level < len(chain) and residue % chain[level][0].dilation_rate in chain[level][1]:
            return 0
        if level == 0:
            return max(0, -(-(size - residue) // common))
        step = chain[level - 1][0].segment_length
        whole, rest = divmod(size, step)
        cycle = common // math.gcd(common, step)
        total = count(level - 1, (residue - whole * step) % common, rest) if rest else 0
        for first in range(min(cycle, whole)):
            times = (whole - 1 - first) // cycle + 1
            total += times * count(level - 1, (residue - first * step) % common, step)
        return total

    taken = [(branch.dilation_rate, frozenset(offsets)) for branch, offsets in aligned]
    return sum(
        count(len(chain), residue, positions)
        for residue in range(common)
        if all(residue % rate not in offsets for rate, offsets in taken)
    )


def _describe(branches: list[tuple[Branch, Offsets]]) -> str:
    """Words for the positions that no branch takes, without the conditions that another one implies."""
    conditions = list(dict.fromkeys(branches))
    for entry in tuple(conditions):
        if any(other is not entry and _implies(other, entry) for other in conditions):
            conditions.remove(entry)
    return "positions p with " + " and ".join(_condition(branch, offsets) for branch, offsets in conditions)


def _implies(one: tuple[Branch, Offsets], other: tuple[Branch, Offsets]) -> bool:
    (first, taken), (second, also_taken) = one, other
    cycle = math.lcm(first.dilation_rate, second.dilation_rate)
    if any(branch.segment_length != branch.dilation_rate for branch in (first, second)) or cycle > 4096:
        return False
    free = (p for p in range(cycle) if p % first.dilation_rate not in taken)
    return all(p % second.dilation_rate not in also_taken for p in free)


def _condition(branch: Branch, taken: Offsets) -> str:
    rate = branch.dilation_rate
    local = "p" if branch.segment_length == rate else f"p mod {branch.segment_length}"
    if rate - len(taken) <= 4:
        free = [str(residue) for residue in sorted(set(range(rate)) - set(taken))]
        return f"{local} mod {rate} in {{{', '.join(free)}}}"
    if len(taken) == 1:
        return f"{local} mod {rate} != {taken[0]}"
    if taken == tuple(range(len(taken))):
        return f"{local} mod {rate} in {{{len(taken)}, {len(taken) + 1}, ..., {rate - 1}}}"
    return f"{local} mod {rate} not in {{{', '.join(map(str, taken))}}}"
