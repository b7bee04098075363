"""Parts of a sequence that can be computed as sequences of their own.

A chunk, the next tokens of a stream or a rank's shard, may start anywhere in a segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from longnet.geometry.pattern import Pattern
from longnet.geometry.rows import UNBOUNDED, Branch


@dataclass(frozen=True)
class OwnPart:
    """Tokens ``first`` to ``last`` that the branches of ``pattern`` treat as a sequence of its own."""

    first: int
    last: int
    pattern: Pattern

    @property
    def tokens(self) -> slice:
        return slice(self.first, self.last)


def windows(pattern: Pattern, length: int, most: int, segment_offset: int = 0) -> list[OwnPart]:
    """``length`` tokens cut so that no query reads a key of another part: at most ``most`` tokens each, or one period."""
    if UNBOUNDED in pattern.segment_lengths:
        return [OwnPart(0, length, pattern)]
    step = max(1, most // pattern.period) * pattern.period
    starts = range(-segment_offset % pattern.period, length, step)
    bounds = sorted({0, *starts, length})
    return [OwnPart(start, stop, pattern) for start, stop in pairwise(bounds)]


def own_parts(pattern: Pattern, start: int, length: int) -> tuple[tuple[OwnPart, ...], tuple[Branch, ...]]:
    """The attention of ``length`` tokens, from position ``start`` on, among themselves.

    Returns:
        The ordinary calls; the one on the whole chunk, if there is one, comes first. And the branches in which the chunk starts
        between two rows: their rows, up to the end of the segment in which it starts, are no ordinary call.
    """
    whole: list[Branch] = []
    parts: dict[tuple[int, int], list[Branch]] = {}
    unaligned = []
    for branch in pattern.branches:
        if branch.is_own_sequence(start, length):
            whole.append(branch)
            continued = length
        else:
            continued = min(length, branch.segment_stop(start) - start)
            if branch.is_aligned(start):
                parts.setdefault((0, continued), []).append(branch)
            else:
                unaligned.append(branch)
        if continued < length:
            parts.setdefault((continued, length), []).append(branch)
    calls = [OwnPart(0, length, pattern.of(*whole))] if whole else []
    calls += [OwnPart(first, last, pattern.of(*branches)) for (first, last), branches in parts.items()]
    return tuple(calls), tuple(unaligned)
