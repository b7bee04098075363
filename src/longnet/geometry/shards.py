"""One sequence in contiguous shards: which rows of other shards a shard needs. Integers only.

Neighbouring shards share a segment that crosses their border. A shard's queries in it need the keys that the others select
there: those before the shard, and in bidirectional attention those after it. Two shards share at most one segment of a branch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from longnet.geometry.pattern import Pattern
from longnet.geometry.rows import Rows


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
class SharedRows:
    """Rows of a segment that one shard owns and the queries of another see.

    Args:
        branch: its number in the pattern.
        before: the owner lies before the receiver.
        kv_head: whose keys they are.
        keys: the owner's rows.
        heads: the query heads that read them.
        queries: the receiver's rows.
    """

    branch: int
    before: bool
    kv_head: int
    keys: Rows
    heads: tuple[int, ...]
    queries: Rows


@lru_cache(maxsize=65536)
def shared_rows(
    pattern: Pattern, heads: int, kv_heads: int, shards: Shards, owner: int, receiver: int, is_causal: bool
) -> tuple[SharedRows, ...]:
    """The rows of shard ``owner`` that queries of shard ``receiver`` see, in the order in which they travel. Cached.

    Rows that no query of the receiver reads are not among them: they travel once for each key/value head and offset.
    """
    if owner == receiver or (is_causal and owner > receiver):
        return ()
    own, own_end = shards.span(owner)
    start, end = shards.span(receiver)
    if own == own_end or start == end:
        return ()
    before, rows = owner < receiver, []
    for index, branch in enumerate(pattern.branches):
        # The one segment that both may share: the receiver's first or last.
        shared = start if before else end - 1
        segment, stop = branch.segment_start(shared), branch.segment_stop(shared)
        first, last = max(segment, own), min(stop, own_end)
        if first >= last:
            continue
        for (offset, kv_head), readers in pattern.readers(branch, heads, kv_heads).items():
            keys = branch.selected(first, last, offset)
            queries = branch.selected(max(segment, start), min(stop, end), offset)
            if keys.size and queries.size:
                rows.append(SharedRows(index, before, kv_head, keys, tuple(readers), queries))
    return tuple(rows)


def rows_sent(
    pattern: Pattern, heads: int, kv_heads: int, shards: Shards, rank: int, is_causal: bool
) -> dict[int, int]:
    """Rows of keys, and as many of values, that a shard sends in a forward pass, by receiver (those with none left out)."""
    counts = {}
    for receiver in range(len(shards.lengths)):
        rows = shared_rows(pattern, heads, kv_heads, shards, rank, receiver, is_causal)
        if rows:
            counts[receiver] = sum(one.keys.size for one in rows)
    return counts
