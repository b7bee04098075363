"""A rank's part of a sharded call as index tensors: what it sends and receives, and which rows meet which."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor

from longnet.attention.backends.views import bias_columns
from longnet.geometry import Branch, Pattern
from longnet.geometry.chunks import OwnPart, own_parts
from longnet.geometry.rows import Rows
from longnet.geometry.shards import Shards, SharedRows, shared_rows
from longnet.runtime.cache import tensor_cache


@dataclass(frozen=True)
class RowGroup:
    """Rows of h heads, equally many of each, so that one call takes them all.

    Args:
        heads: (h, 1) query heads.
        tokens: (h, a) the shard's tokens that are queries.
        share: neighbouring heads that read the same keys (grouped-query attention).
        key_heads: (h / share, 1) and key_tokens: (h / share, b), the shard's own keys; None where ``received`` holds them.
            No key is in it twice.
        received: (h / share, b) rows of what has been received, or None.
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

    def bias_columns(self, bias: Tensor) -> slice:
        """The columns of a bias (H, 2L - 1) at the distances of the rows."""
        keys = self.key_tokens if self.received is None else self.received
        assert keys is not None
        return bias_columns(bias, self.tokens.shape[1], keys.shape[1], self.step, self.distance)


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
    """A rank's place in a sharded call. Hashable. The paper's patterns have a ``segment_offset`` of 0."""

    pattern: Pattern
    heads: int
    kv_heads: int
    shards: Shards
    rank: int
    is_causal: bool
    segment_offset: int = 0

    def shared_rows(self, owner: int, receiver: int) -> tuple[SharedRows, ...]:
        return shared_rows(self.pattern, self.heads, self.kv_heads, self.shards, owner, receiver, self.is_causal)

    @property
    def rows_received(self) -> int:
        """Rows of keys, and as many of values, that come from other ranks."""
        return sum(_count(self.shared_rows(owner, self.rank)) for owner in range(len(self.shards.lengths)))


@tensor_cache(64)
def make_plan(place: Place, device: torch.device) -> ShardPlan:
    """The plan of a place, with its tensors on ``device``. Cached."""
    start, end = place.shards.span(place.rank)
    ranks = range(len(place.shards.lengths))
    parts, unaligned = own_parts(place.pattern, start, end - start)
    outgoing = [place.shared_rows(place.rank, receiver) for receiver in ranks]
    incoming = [place.shared_rows(owner, place.rank) for owner in ranks]

    # Rows of one branch are of different heads or offsets.
    runs = [_count(rows) for shared in outgoing for _, rows in groupby(shared, key=lambda one: one.branch)]
    sent = [one for shared in outgoing for one in shared]
    nothing = torch.zeros(0, dtype=torch.int64)
    send_heads = torch.cat([nothing, *(torch.full((one.keys.size,), one.kv_head) for one in sent)])
    send_tokens = torch.cat([nothing, *(_tokens([one.keys], start)[0] for one in sent)])
    places, place_of = torch.unique(torch.stack((send_heads, send_tokens), 1), dim=0, return_inverse=True)
    return ShardPlan(
        parts,
        tuple(group.to(device) for branch in unaligned for group in _own_groups(place, branch, start, end)),
        tuple(group.to(device) for group in _remote_groups(incoming, start)),
        tuple(map(_count, outgoing)),
        tuple(map(_count, incoming)),
        send_heads.to(device),
        send_tokens.to(device),
        places.to(device),
        place_of.to(device),
        tuple(runs),
    )


def _own_groups(place: Place, branch: Branch, start: int, end: int) -> list[RowGroup]:
    """The shard's rows of the segment in which it starts, by how many a head selects and how many heads share them."""
    stop = min(branch.segment_stop(start), end)
    alike: dict[tuple[int, int], list[tuple[int, Rows, list[int]]]] = {}
    for (offset, kv_head), heads in place.pattern.readers(branch, place.heads, place.kv_heads).items():
        rows = branch.selected(start, stop, offset)
        if rows.size:
            alike.setdefault((rows.size, len(heads)), []).append((kv_head, rows, heads))
    groups = []
    for (_, share), members in alike.items():
        readers = _column(head for _, _, heads in members for head in heads)
        tokens = _tokens([rows for _, rows, _ in members], start)
        queries, kv_heads = tokens.repeat_interleave(share, 0), _column(kv_head for kv_head, _, _ in members)
        step = branch.dilation_rate
        groups.append(RowGroup(readers, queries, share, kv_heads, tokens, None, place.is_causal, 0, step))
    return groups


def _remote_groups(incoming: list[tuple[SharedRows, ...]], start: int) -> list[RowGroup]:
    """The shard's queries and the rows of others that they see, by how many there are of both."""
    # Owners in rank order hold neighbouring rows of a segment.
    pieces: dict[tuple[int, bool, tuple[int, ...]], list[tuple[SharedRows, Tensor]]] = {}
    row = 0
    for one in chain.from_iterable(incoming):
        received = torch.arange(row, row + one.keys.size)
        pieces.setdefault((one.branch, one.before, one.heads), []).append((one, received))
        row += one.keys.size
    alike: dict[tuple[int, ...], list[tuple[SharedRows, Tensor]]] = {}
    for (branch, before, readers), same_heads in pieces.items():
        first, received = same_heads[0][0], torch.cat([rows for _, rows in same_heads])
        distance = first.keys.first - first.queries.first
        shape = (branch, before, first.queries.size, len(received), len(readers), distance)
        alike.setdefault(shape, []).append((first, received))
    groups = []
    for (*_, share, distance), members in alike.items():
        heads = _column(head for one, _ in members for head in one.heads)
        queries = _tokens([one.queries for one, _ in members], start).repeat_interleave(share, 0)
        kv_heads = _column(one.kv_head for one, _ in members)
        received, step = torch.stack([rows for _, rows in members]), members[0][0].queries.step
        groups.append(RowGroup(heads, queries, share, kv_heads, None, received, False, distance, step))
    return groups


def _count(shared: Iterable[SharedRows]) -> int:
    return sum(one.keys.size for one in shared)


def _column(numbers: Iterable[int]) -> Tensor:
    return torch.tensor(list(numbers))[:, None]


def _tokens(rows: list[Rows], start: int) -> Tensor:
    """Equally many rows each as tokens of a shard that begins at ``start``, (len(rows), count)."""
    first, one = _column(row.first - start for row in rows), rows[0]
    return first + one.step * torch.arange(one.size)
