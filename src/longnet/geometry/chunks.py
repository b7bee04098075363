"""What the tokens of a chunk say to each other, wherever it starts in the sequence: a part of a stream, or a rank's shard."""

from __future__ import annotations

from dataclasses import dataclass

from longnet.geometry.pattern import Pattern
from longnet.geometry.rows import Branch


@dataclass(frozen=True)
class OwnPart:
    """Tokens ``first`` to ``last`` of a chunk that these branches treat as a sequence of its own."""

    first: int
    last: int
    branches: tuple[Branch, ...]

    @property
    def tokens(self) -> slice:
        return slice(self.first, self.last)


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
    calls = [OwnPart(0, length, tuple(whole))] if whole else []
    calls += [OwnPart(first, last, tuple(branches)) for (first, last), branches in parts.items()]
    return tuple(calls), tuple(unaligned)
