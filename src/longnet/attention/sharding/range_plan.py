"""Which keys ranks exchange, and which queries read them: windows, all queries, blocks, segments without end, other grids.

Keys of other ranks are received, each once for every key/value head and head offset, and a query reads a range of them.
Positions are a ``range`` where they are at equal steps, so that a long shard costs no more to plan than a short one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

import torch

from longnet.attention.key_ranges import KeyRanges, Positions, ranges_between, tensor_of
from longnet.attention.sharding.plan import Place
from longnet.geometry.shards import KeyPart, SharedKeys, shared_keys
from longnet.runtime.cache import tensor_cache

# Tokens between a query and a key.
_LONGEST_CACHED = 1 << 14


class Keys(NamedTuple):
    """Keys that travel from one rank to another: rising positions of each key/value head."""

    part: KeyPart
    positions: Positions


class Reads(Enum):
    """Which keys of a reading its queries read: all of them; from the one with the query's number on; up to it; some."""

    ALL, FROM_OWN, UP_TO_OWN, SOME = range(4)


@dataclass(frozen=True)
class Reading:
    """Queries of the shard, rising, and received keys of one part.

    Args:
        pieces: the numbers of pieces of the part's keys, which are ordered by rank.
        keys: the positions of the keys.
        first: how many keys of the pieces come before them.
        reads: with ``FROM_OWN`` and ``UP_TO_OWN`` there are as many queries as keys.
    """

    part: KeyPart
    queries: Positions
    pieces: range
    keys: Positions
    reads: Reads
    first: int = 0

    @property
    def rows(self) -> slice:
        """The keys among those of the pieces."""
        return slice(self.first, self.first + len(self.keys))

    def ranges(self, place: Place) -> KeyRanges:
        """What each query reads; queries that read nothing are left out."""
        heads = torch.tensor(self.part.heads, device="cpu")
        about = place.pattern, self.part.branch, heads, tensor_of(self.queries), tensor_of(self.keys)
        return ranges_between(*about, place.is_causal, self.part.origin(place.segment_offset))


@dataclass(frozen=True)
class RangePlan:
    """What a rank sends and receives for one sequence, and what its queries read of it. On the CPU.

    Args:
        sent, received: to and from every rank.
        read: a received key and a query that reads it are in one of these, once.
        queries, keys: positions among which are all queries that read received keys, and all keys that are sent.
    """

    sent: tuple[tuple[Keys, ...], ...]
    received: tuple[tuple[Keys, ...], ...]
    read: tuple[Reading, ...]
    queries: Positions
    keys: Positions


def rows_exchanged(place: Place, batches: dict[int, int], sent: bool) -> tuple[int, ...]:
    """Rows of keys, and as many of values, to or from every rank.

    Args:
        place: of one sequence.
        batches: how many sequences have each offset of the grid.
    """

    def count(other: int) -> int:
        pair = (place.rank, other) if sent else (other, place.rank)
        return sum(
            batch * one.rows
            for value, batch in batches.items()
            for one in _shared(replace(place, segment_offset=value), *pair)
        )

    return tuple(map(count, range(len(place.shards.lengths))))


def range_plan(place: Place) -> RangePlan:
    """The plan of a place; cached, except where it can be long."""
    make = _cached_plan if place.pattern.span(place.shards.total) <= _LONGEST_CACHED else _make_plan
    return make(place)


def _make_plan(place: Place) -> RangePlan:
    with torch.inference_mode(False):
        ranks = range(len(place.shards.lengths))
        sent, received = (
            tuple(tuple(_keys(one, place) for one in _shared(place, *pair)) for pair in pairs)
            for pairs in (((place.rank, other) for other in ranks), ((other, place.rank) for other in ranks))
        )
        pieces: dict[KeyPart, list[Positions]] = {}
        for part, positions in (one for keys in received for one in keys):
            pieces.setdefault(part, []).append(positions)
        read = tuple(reading for part, positions in pieces.items() for reading in _readings(place, part, positions))
        keys = _among([one.positions for keys in sent for one in keys])
        return RangePlan(sent, received, read, _among([reading.queries for reading in read]), keys)


def _among(positions: Sequence[Positions]) -> Positions:
    """The union; where it is long and has few gaps, all from the first to the last."""
    positions = [one for one in positions if len(one)]
    if not positions:
        return range(0)
    hull = range(min(int(one[0]) for one in positions), max(int(one[-1]) for one in positions) + 1)
    if 2 * sum(map(len, positions)) >= len(hull):
        return hull
    return torch.unique(torch.cat([tensor_of(one) for one in positions]))


_cached_plan = tensor_cache(64)(_make_plan)


def _shared(place: Place, owner: int, receiver: int) -> tuple[SharedKeys, ...]:
    return shared_keys(
        place.pattern, place.heads, place.kv_heads, place.shards, owner, receiver, place.is_causal, place.segment_offset
    )


def _keys(shared: SharedKeys, place: Place) -> Keys:
    return Keys(shared.part, _chosen(shared.part, range(shared.first, shared.stop), place))


def _chosen(part: KeyPart, positions: range, place: Place) -> Positions:
    """Those of neighbouring positions that the part's heads select."""
    branch, origin = part.branch, part.origin(place.segment_offset)
    if branch is None or branch.dilation_rate == 1:
        return positions
    first, last = positions.start + origin, positions.stop + origin
    if branch.block == 1 and branch.segment_start(first) == branch.segment_start(last - 1):
        on_grid = branch.selected(first, last, part.offset).positions
        return range(on_grid.start - origin, on_grid.stop - origin, on_grid.step)
    found = tensor_of(positions)
    return found[branch.selects(found + origin, part.offset)]


def _readings(place: Place, part: KeyPart, pieces: list[Positions]) -> Iterator[Reading]:
    """Who reads the received keys of a part."""
    start, end = place.shards.span(place.rank)
    pattern, branch, origin = place.pattern, part.branch, part.origin(place.segment_offset)
    # The queries that read the token before the shard, and those that read the token after it.
    low = min(end, max(start, pattern.read_span(branch, start - 1, False, origin)[1]))
    high = end if place.is_causal else max(start, min(end, pattern.read_span(branch, end, False, origin)[0]))
    before = sum(int(positions[0]) < start for positions in pieces)
    for numbers, queries in ((range(before), range(start, low)), (range(before, len(pieces)), range(high, end))):
        if not len(queries) or not len(numbers):
            continue
        if branch is None:
            keys = range(int(pieces[numbers[0]][0]), int(pieces[numbers[-1]][-1]) + 1)
            yield from _readings_of_window(part, numbers, queries, keys, place)
            continue
        chosen = _chosen(part, queries, place) if pattern.dilated_queries else queries
        if not len(chosen):
            continue
        # What a query reads begins and ends later the later it stands.
        first = pattern.read_span(branch, int(chosen[-1]), False, origin)[0]
        stop = pattern.read_span(branch, int(chosen[0]), False, origin)[1]
        if first <= int(pieces[numbers[0]][0]) and int(pieces[numbers[-1]][-1]) < stop:
            # One by one: a call then has as many keys as a shard at most.
            yield from (Reading(part, chosen, range(n, n + 1), pieces[n], Reads.ALL) for n in numbers)
        else:
            joined = torch.cat([tensor_of(pieces[number]) for number in numbers])
            yield Reading(part, chosen, numbers, joined, Reads.SOME)


def _readings_of_window(part: KeyPart, pieces: range, queries: range, keys: range, place: Place) -> Iterator[Reading]:
    """A window over one border of the shard. The further from it, the fewer of the keys a query reads, one less each time."""
    window = place.pattern.window
    assert window is not None
    is_before = keys[0] < queries[0]
    # So many queries next to the border read all keys. So does the next one, and with those after it a triangle begins.
    count = min(len(queries), max(0, window - len(keys) - 1))
    rest = len(queries) - count
    if is_before:
        all_of_them, others = queries[:count], queries[count:]
        triangle, near = keys[:rest], keys[rest:]
    else:
        all_of_them, others = queries[rest:], queries[:rest]
        triangle, near = keys[len(keys) - rest :], keys[: len(keys) - rest]
    if count:
        yield Reading(part, all_of_them, pieces, keys, Reads.ALL)
    if rest:
        kind = Reads.FROM_OWN if is_before else Reads.UP_TO_OWN
        yield Reading(part, others, pieces, triangle, kind, triangle[0] - keys[0])
        if len(near):
            yield Reading(part, others, pieces, near, Reads.ALL, near[0] - keys[0])
