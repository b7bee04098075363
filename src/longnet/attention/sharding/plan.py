"""A rank's part of a sharded call as index tensors: what it sends and receives, and which rows meet which."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from longnet.geometry import Pattern
from longnet.geometry.shards import Lane, OwnPart, Shards, lanes, own_parts
from longnet.runtime.cache import tensor_cache


@dataclass(frozen=True)
class RowGroup:
    """Lanes that hold equally many rows, so that one call takes them all.

    Args:
        heads: (lanes, 1) query heads.
        tokens: (lanes, a) the shard's tokens that are queries.
        share: neighbouring lanes that read the same keys (grouped-query attention).
        key_heads: (lanes / share, 1) and key_tokens: (lanes / share, b), the shard's own keys; None where ``received`` holds
            them. No key is in it twice.
        received: (lanes / share, b) rows of what has been received, or None.
        is_causal: of the rows among themselves.
        distance: tokens from the first query to the first key.
        step: tokens from row to row.
    """

    heads: Tensor
    tokens: Tensor
    share: int
    key_heads: Tensor
    key_tokens: Tensor | None
    received: Tensor | None
    is_causal: bool
    distance: int
    step: int

    def to(self, device: torch.device) -> RowGroup:
        tensors: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors)

    def distances(self, centre: int) -> slice:
        """Of a bias by distance (H, 2L - 1), whose distance 0 is at ``centre``: those of the rows, in order."""
        keys = self.key_tokens if self.received is None else self.received
        assert keys is not None
        lowest = centre + self.distance - (self.tokens.shape[1] - 1) * self.step
        count = self.tokens.shape[1] + keys.shape[1] - 1
        return slice(lowest, lowest + (count - 1) * self.step + 1, self.step)


@dataclass(frozen=True)
class ShardPlan:
    """All of a rank's work.

    Args:
        parts: ordinary calls on slices of the shard.
        own: rows of the shard among themselves, remote: the shard's queries and received keys.
        sent, received: rows to and from every rank.
        send_heads, send_tokens: (rows sent,) where they stand, in the order in which they travel.
        places, place_of: (different places, 2) heads and tokens of what is sent, and of every row sent its number there.
        runs: lengths of neighbouring rows sent in which no place is twice.
    """

    parts: tuple[OwnPart, ...]
    own: tuple[RowGroup, ...]
    remote: tuple[RowGroup, ...]
    sent: tuple[int, ...]
    received: tuple[int, ...]
    send_heads: Tensor
    send_tokens: Tensor
    places: Tensor
    place_of: Tensor
    runs: tuple[int, ...]

    @property
    def is_simple(self) -> bool:
        """One ordinary call takes all that the shard's tokens say to each other."""
        return len(self.parts) == 1 and not self.own and self.parts[0].first == 0


@dataclass(frozen=True)
class Place:
    """A rank's place in a sharded call. Hashable."""

    pattern: Pattern
    heads: int
    kv_heads: int
    shards: Shards
    rank: int
    is_causal: bool

    def lanes(self, owner: int, receiver: int) -> tuple[Lane, ...]:
        return lanes(self.pattern, self.heads, self.kv_heads, self.shards, owner, receiver, self.is_causal)

    @property
    def rows_received(self) -> int:
        """Rows of keys, and as many of values, that come from other ranks."""
        return sum(lane.rows for owner in range(len(self.shards.lengths)) for lane in self.lanes(owner, self.rank))


@tensor_cache(64)
def make_plan(place: Place, device: torch.device) -> ShardPlan:
    """The plan of a place, with its tensors on ``device``. Cached."""
    shards, rank = place.shards, place.rank
    start, end = shards.span(rank)
    ranks = range(len(shards.lengths))
    parts, own = own_parts(place.pattern, place.heads, start, end - start)
    group = place.heads // place.kv_heads

    own_groups = []
    for one in own:
        readers: dict[tuple[int, int], list[int]] = {}
        for head in range(place.heads):
            if one.rows(head):
                readers.setdefault((head // group, one.first_rows[head]), []).append(head)
        alike: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for key, heads in readers.items():
            alike.setdefault((one.rows(heads[0]), len(heads)), []).append(key)
        for (count, share), keys in alike.items():
            heads, rate = [head for key in keys for head in readers[key]], one.branch.dilation_rate
            tokens = _arithmetic([first for _, first in keys], rate, count)
            queries = tokens.repeat_interleave(share, 0)
            key_heads = _column([kv_head for kv_head, _ in keys])
            own_groups.append(
                RowGroup(_column(heads), queries, share, key_heads, tokens, None, place.is_causal, 0, rate)
            )

    send_heads, send_tokens, sent, runs = [], [], [], []
    for receiver in ranks:
        found = place.lanes(rank, receiver)
        sent.append(sum(lane.rows for lane in found))
        # Lanes of one branch are of different heads or offsets.
        runs += [sum(lane.rows for lane in lanes) for _, lanes in groupby(found, key=lambda lane: lane.branch)]
        for lane in found:
            rate = place.pattern.branches[lane.branch].dilation_rate
            first = lane.segment + lane.offset + lane.row * rate - start
            send_heads.append(torch.full((lane.rows,), lane.kv_head))
            send_tokens.append(first + rate * torch.arange(lane.rows))

    # Where the rows of every lane lie in what is received: owners in rank order hold neighbouring rows of a segment.
    at: dict[tuple[int, bool, int, int], list[tuple[int, int]]] = {}
    segments: dict[tuple[int, bool], tuple[int, dict[tuple[int, int], int]]] = {}
    received, row = [], 0
    for owner in ranks:
        found = place.lanes(owner, rank)
        received.append(sum(lane.rows for lane in found))
        for lane in found:
            at.setdefault((lane.branch, lane.before, lane.kv_head, lane.offset), []).append((row, lane.rows))
            segments.setdefault((lane.branch, lane.before), (lane.segment, {}))[1].setdefault(
                (lane.kv_head, lane.offset), lane.row
            )
            row += lane.rows
    remote_groups = []
    for (index, before), (segment, first_rows) in segments.items():
        remote_groups += _remote_groups(place, index, segment, before, first_rows, at)

    nothing = torch.zeros(0, dtype=torch.int64)
    heads_sent, tokens_sent = torch.cat([nothing, *send_heads]), torch.cat([nothing, *send_tokens])
    places, place_of = torch.unique(torch.stack((heads_sent, tokens_sent), 1), dim=0, return_inverse=True)
    return ShardPlan(
        parts,
        tuple(one.to(device) for one in own_groups),
        tuple(one.to(device) for one in remote_groups),
        tuple(sent),
        tuple(received),
        heads_sent.to(device),
        tokens_sent.to(device),
        places.to(device),
        place_of.to(device),
        tuple(runs),
    )


def _remote_groups(
    place: Place,
    index: int,
    segment: int,
    before: bool,
    first_rows: dict[tuple[int, int], int],
    at: dict[tuple[int, bool, int, int], list[tuple[int, int]]],
) -> list[RowGroup]:
    """The shard's queries in a shared segment and the rows that others hold of it, by how many there are of both."""
    branch = place.pattern.branches[index]
    start, end = place.shards.span(place.rank)
    low, high = max(segment, start) - segment, min(segment + branch.segment_length, end) - segment
    rate, group = branch.dilation_rate, place.heads // place.kv_heads
    readers: dict[tuple[int, int], list[int]] = {}
    for head in range(place.heads):
        readers.setdefault((head // group, place.pattern.offset(branch, head, place.heads)), []).append(head)
    alike: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for key in first_rows:
        first, last = branch.rows(low, key[1]), branch.rows(high, key[1])
        keys = sum(count for _, count in at[index, before, *key])
        distance = (first_rows[key] - first) * rate
        alike.setdefault((last - first, keys, distance, len(readers[key])), []).append(key)
    found = []
    for (count, _, distance, share), members in alike.items():
        heads = [head for key in members for head in readers[key]]
        tokens = [segment + offset + branch.rows(low, offset) * rate - start for _, offset in members]
        received = [torch.cat([torch.arange(row, row + n) for row, n in at[index, before, *key]]) for key in members]
        queries = _arithmetic(tokens, rate, count).repeat_interleave(share, 0)
        key_heads = _column([kv_head for kv_head, _ in members])
        group_received = torch.stack(received)
        found.append(RowGroup(_column(heads), queries, share, key_heads, None, group_received, False, distance, rate))
    return found


def _column(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers)[:, None]


def _arithmetic(first: list[int], step: int, count: int) -> Tensor:
    return _column(first) + step * torch.arange(count)
