"""Parts of a sequence that are sequences of their own, and what the tokens of a chunk say to each other.

A chunk may start anywhere: it is what a stream reads next, or a rank's shard.
"""

from __future__ import annotations

from dataclasses import dataclass

from longnet.geometry.pattern import Pattern
from longnet.geometry.rows import Branch


@dataclass(frozen=True)
class OwnPart:
    """Tokens ``first`` to ``last`` that the branches of ``pattern`` treat as a sequence of its own."""

    first: int
    last: int
    pattern: Pattern

    @property
    def tokens(self) -> slice:
        return slice(self.first, self.last)


def windows(pattern: Pattern, length: int, most: int) -> list[OwnPart]:
    """``length`` tokens in parts across which no key is read. A part has at most ``most`` tokens, or those of one period."""
    step = max(1, most // pattern.period) * pattern.period
    return [OwnPart(start, min(start + step, length), pattern) for start in range(0, length, step)]


def own_parts(pattern: Pattern, start: int, length: int) -> tuple[tuple[OwnPart, ...], tuple[Branch, ...]]:
    """What ``length`` tokens from position ``start`` on say to each other: ordinary calls, and branches to take row by row.

    The first part is the largest: all branches for which the chunk is a sequence that begins at its first token. A branch is
    taken row by row, up to the end of the segment in which the chunk starts, where the chunk starts between its rows.
    """
    whole: list[Branch] = []
    parts: dict[tuple[int, int], list[Branch]] = {}
    unaligned = []
    for branch in pattern.branches:
        if branch.begins_anew(start, length):
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
