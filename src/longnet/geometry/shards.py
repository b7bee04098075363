"""One sequence in contiguous shards: what a shard computes by itself, and which rows of others it needs. Integers only.

A branch's segment that lies inside a shard is the shard's own affair. One that crosses a shard's border is shared by
neighbouring shards, and a shard's queries in it need the keys that the others select there: those of the segment before the
shard (``before``), and in bidirectional attention those after it. Two shards share at most one segment of a branch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from longnet.geometry.pattern import Branch, Pattern


@dataclass(frozen=True)
class Shards:
    """Shard lengths in tokens, in rank order; shards may be empty."""

    lengths: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.lengths)

    def start(self, rank: int) -> int:
        return sum(self.lengths[:rank])

    def span(self, rank: int) -> tuple[int, int]:
        """(first token, one past the last)."""
        start = self.start(rank)
        return start, start + self.lengths[rank]


@dataclass(frozen=True)
class OwnPart:
    """Tokens ``first`` to ``last`` of a shard that these branches treat as a sequence of its own."""

    first: int
    last: int
    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class OwnRows:
    """The end of a segment of ``branch`` that the shard continues, where it begins between the branch's rows.

    Of the shard's first ``last`` tokens, head ``j`` selects those at ``first_rows[j]`` and every ``rate`` after it.
    """

    branch: Branch
    last: int
    first_rows: tuple[int, ...]

    def rows(self, head: int) -> int:
        return self.branch.rows(self.last, self.first_rows[head])


@dataclass(frozen=True)
class Lane:
    """Rows of one key/value head that one offset of a branch selects: ``rows`` from row ``row`` of the segment on.

    The row ``t`` stands at ``segment + offset + t * rate``. ``before`` if the owner lies before the receiver.
    """

    branch: int
    segment: int
    kv_head: int
    offset: int
    row: int
    rows: int
    before: bool


def own_parts(pattern: Pattern, heads: int, start: int, length: int) -> tuple[tuple[OwnPart, ...], tuple[OwnRows, ...]]:
    """What ``length`` tokens from position ``start`` on say to each other, as ordinary calls and as selected rows.

    The first part is the largest: all branches for which the shard is a sequence that begins at its first token.
    """
    whole: list[Branch] = []
    parts: dict[tuple[int, int], list[Branch]] = {}
    rows = []
    for branch in pattern.branches:
        inside = start % branch.segment_length
        continued = min(length, branch.segment_length - inside)
        aligned = inside % branch.dilation_rate == 0
        if inside == 0 or (aligned and continued == length):
            whole.append(branch)
            continue
        if aligned:
            parts.setdefault((0, continued), []).append(branch)
        else:
            first = [(pattern.offset(branch, j, heads) - inside) % branch.dilation_rate for j in range(heads)]
            rows.append(OwnRows(branch, continued, tuple(first)))
        if continued < length:
            parts.setdefault((continued, length), []).append(branch)
    found = [OwnPart(0, length, tuple(whole))] if whole else []
    found += [OwnPart(first, last, tuple(branches)) for (first, last), branches in parts.items()]
    return tuple(found), tuple(rows)


@lru_cache(maxsize=65536)
def lanes(
    pattern: Pattern, heads: int, kv_heads: int, shards: Shards, owner: int, receiver: int, is_causal: bool
) -> tuple[Lane, ...]:
    """The rows of shard ``owner`` that queries of shard ``receiver`` see, in the order in which they travel. Cached.

    Rows that no query of the receiver reads are not among them: they travel once for each key/value head and offset.
    """
    if owner == receiver or (is_causal and owner > receiver):
        return ()
    own, own_end = shards.span(owner)
    start, end = shards.span(receiver)
    if own == own_end or start == end:
        return ()
    before, group, found = owner < receiver, heads // kv_heads, []
    for index, branch in enumerate(pattern.branches):
        # The one segment that both may share: the receiver's first or last.
        shared = start if before else end - 1
        segment = shared // branch.segment_length * branch.segment_length
        stop = min(segment + branch.segment_length, shards.total)
        low, high = max(segment, own) - segment, min(stop, own_end) - segment
        if low >= high:
            continue
        seen = set()
        for head in range(heads):
            offset = pattern.offset(branch, head, heads)
            queries = branch.rows(min(stop, end) - segment, offset) - branch.rows(max(segment, start) - segment, offset)
            row, last = branch.rows(low, offset), branch.rows(high, offset)
            if queries > 0 and last > row and (head // group, offset) not in seen:
                seen.add((head // group, offset))
                found.append(Lane(index, segment, head // group, offset, row, last - row, before))
    return tuple(found)


def rows_sent(
    pattern: Pattern, heads: int, kv_heads: int, shards: Shards, rank: int, is_causal: bool
) -> dict[int, int]:
    """Rows of keys, and as many of values, that a shard sends in a forward pass, by receiver (those with none left out)."""
    found = {}
    for receiver in range(len(shards.lengths)):
        count = sum(lane.rows for lane in lanes(pattern, heads, kv_heads, shards, rank, receiver, is_causal))
        if count:
            found[receiver] = count
    return found
