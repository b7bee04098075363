"""Which keys ranks exchange, and which queries read them: windows, all queries, blocks, segments without end, other grids.

Keys of other ranks are received, each once for every key/value head and head offset, and a query reads a range of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from longnet.attention.key_ranges import KeyRanges, ranges_between
from longnet.attention.sharding.plan import Place
from longnet.geometry.shards import KeyPart, SharedKeys, shared_keys
from longnet.runtime.cache import tensor_cache

# Tokens between a query and a key.
_LONGEST_CACHED = 1 << 14


class Keys(NamedTuple):
    """Keys that travel from one rank to another: (b,) rising positions of each key/value head."""

    part: KeyPart
    positions: Tensor


@dataclass(frozen=True)
class RangePlan:
    """What a rank sends and receives for one sequence, and what its queries read of it. On the CPU.

    Args:
        sent, received: to and from every rank.
        read: received keys of one part, those of all ranks in order.
        queries, keys: rising positions of the queries that read received keys, and of the keys that are sent.
    """

    sent: tuple[tuple[Keys, ...], ...]
    received: tuple[tuple[Keys, ...], ...]
    read: tuple[tuple[KeyPart, KeyRanges], ...]
    queries: Tensor
    keys: Tensor


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
        pieces: dict[KeyPart, list[Tensor]] = {}
        for part, positions in (one for keys in received for one in keys):
            pieces.setdefault(part, []).append(positions)
        read = tuple((part, _read(place, part, torch.cat(p))) for part, p in pieces.items())
        keys = _union([one.positions for keys in sent for one in keys])
        return RangePlan(sent, received, read, _union([ranges.queries for _, ranges in read]), keys)


def _union(positions: list[Tensor]) -> Tensor:
    nothing = torch.empty(0, dtype=torch.int64, device="cpu")
    return torch.unique(torch.cat([nothing, *positions]))


_cached_plan = tensor_cache(64)(_make_plan)


def _shared(place: Place, owner: int, receiver: int) -> tuple[SharedKeys, ...]:
    return shared_keys(
        place.pattern, place.heads, place.kv_heads, place.shards, owner, receiver, place.is_causal, place.segment_offset
    )


def _keys(shared: SharedKeys, place: Place) -> Keys:
    return Keys(shared.part, _chosen(shared.part, torch.arange(shared.first, shared.stop, device="cpu"), place))


def _chosen(part: KeyPart, positions: Tensor, place: Place) -> Tensor:
    """Those of the positions that the part's heads select."""
    if part.branch is None:
        return positions
    return positions[part.branch.selects(positions + part.origin(place.segment_offset), part.offset)]


def _read(place: Place, part: KeyPart, keys: Tensor) -> KeyRanges:
    start, end = place.shards.span(place.rank)
    pattern, branch, origin = place.pattern, part.branch, part.origin(place.segment_offset)
    # The queries that read the token before the shard, and those that read the token after it.
    low = min(end, max(start, pattern.read_span(branch, start - 1, False, origin)[1]))
    high = end if place.is_causal else min(end, max(low, pattern.read_span(branch, end, False, origin)[0]))
    queries = torch.cat((torch.arange(start, low, device="cpu"), torch.arange(high, end, device="cpu")))
    if pattern.dilated_queries:
        queries = _chosen(part, queries, place)
    heads = torch.tensor(part.heads, device="cpu")
    return ranges_between(pattern, branch, heads, queries, keys, place.is_causal, origin)
