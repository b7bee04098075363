"""One sequence in contiguous shards: which rows of other shards a shard needs. Integers only.

Neighbouring shards share a segment that crosses their border. A shard's queries in it need the keys that the others select
there: those before the shard, and in bidirectional attention those after it. Two shards share at most one segment of a branch.

:func:`shared_keys` says that for any pattern. :func:`shared_rows` says it for the paper's, with the queries: there keys and
queries are the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from longnet.geometry.pattern import Pattern
from longnet.geometry.rows import Branch, Rows


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


@dataclass(frozen=True)
class KeyPart:
    """The keys of one branch that heads with one offset select, or those of the window, and who reads them. Hashable.

    Args:
        number: of the branch in the pattern, since it may be there twice; -1 for the window.
        branch: None for the window, which has every key.
        offset: of the heads in the branch.
        kv_heads: whose keys they are, rising.
        heads: the query heads that read them, rising: the same number of each key/value head.
    """

    number: int
    branch: Branch | None
    offset: int
    kv_heads: tuple[int, ...]
    heads: tuple[int, ...]

    @property
    def share(self) -> int:
        """Query heads that read one key/value head."""
        return len(self.heads) // len(self.kv_heads)

    def origin(self, segment_offset: int) -> int:
        """Where token 0 stands on the branch's grid."""
        return 0 if self.branch is None else self.branch.origin(segment_offset)


@lru_cache(maxsize=256)
def key_parts(pattern: Pattern, heads: int, kv_heads: int) -> tuple[KeyPart, ...]:
    """All keys of a pattern, in the order in which they travel. Cached."""
    parts = []
    if pattern.window is not None:
        parts.append(KeyPart(-1, None, 0, tuple(range(kv_heads)), tuple(range(heads))))
    for number, branch in enumerate(pattern.branches):
        alike: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
        for (offset, kv_head), readers in pattern.readers(branch, heads, kv_heads).items():
            whose, who = alike.setdefault((offset, len(readers)), ([], []))
            whose.append(kv_head)
            who.extend(readers)
        parts += [KeyPart(number, branch, offset, tuple(kv), tuple(q)) for (offset, _), (kv, q) in alike.items()]
    return tuple(parts)


@dataclass(frozen=True)
class SharedKeys:
    """Keys that one shard owns and queries of another read.

    Args:
        part: which keys.
        first, stop: the owner's positions among which they are.
        size: how many they are, for each key/value head.
    """

    part: KeyPart
    first: int
    stop: int
    size: int

    @property
    def rows(self) -> int:
        """Rows of keys, and as many of values, of one sequence."""
        return self.size * len(self.part.kv_heads)


@lru_cache(maxsize=65536)
def shared_keys(
    pattern: Pattern,
    heads: int,
    kv_heads: int,
    shards: Shards,
    owner: int,
    receiver: int,
    is_causal: bool,
    segment_offset: int = 0,
) -> tuple[SharedKeys, ...]:
    """The keys of shard ``owner`` that queries of shard ``receiver`` read, in the order in which they travel. Cached.

    They travel once for each key/value head and offset. Keys that no query of the receiver reads are not among them.
    """
    if owner == receiver or (is_causal and owner > receiver):
        return ()
    own, own_end = shards.span(owner)
    start, end = shards.span(receiver)
    if own == own_end or start == end:
        return ()
    found = []
    for part in key_parts(pattern, heads, kv_heads):
        branch, origin = part.branch, part.origin(segment_offset)
        # Who reads the token beside the receiver's shard is among the readers, and its first or last token reads most.
        if owner < receiver:
            first, stop = max(own, pattern.read_span(branch, start, False, origin)[0]), own_end
            readers = start, min(end, pattern.read_span(branch, start - 1, False, origin)[1])
        else:
            first, stop = own, min(own_end, pattern.read_span(branch, end - 1, False, origin)[1])
            readers = max(start, pattern.read_span(branch, end, False, origin)[0]), end
        if first >= stop:
            continue
        size = stop - first
        if branch is not None:
            size = branch.count(first + origin, stop + origin, part.offset)
            if pattern.dilated_queries and not branch.count(readers[0] + origin, readers[1] + origin, part.offset):
                continue
        if size:
            found.append(SharedKeys(part, first, stop, size))
    return tuple(found)


def rows_sent(
    pattern: Pattern,
    heads: int,
    kv_heads: int,
    shards: Shards,
    rank: int,
    is_causal: bool,
    segment_offset: int = 0,
) -> dict[int, int]:
    """Rows of keys, and as many of values, that a shard sends in a forward pass, by receiver (those with none left out).

    Args:
        pattern: with ``"grouped"`` offsets what its ``grouped(heads, kv_heads)`` gives.
    """
    counts = {}
    for receiver in range(len(shards.lengths)):
        keys = shared_keys(pattern, heads, kv_heads, shards, rank, receiver, is_causal, segment_offset)
        if keys:
            counts[receiver] = sum(one.rows for one in keys)
    return counts
