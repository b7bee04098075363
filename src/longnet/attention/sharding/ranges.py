"""A rank's shard of attention beyond the paper: windows, all queries, blocks, segments without end, other grids.

The shard's own part is an ordinary call: a shard that starts at ``p`` is a sequence on a grid that is offset by ``p``. Keys of
other ranks are received, each once for every key/value head and head offset, and a query reads a range of them. As in
:mod:`longnet.attention.sharding.attend` all parts are mixed into one softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from longnet.attention import merge
from longnet.attention.backends import Backend
from longnet.attention.call import AttentionInputs, Gradients, SavedForward, lse_dtype
from longnet.attention.chunked import Rows
from longnet.attention.key_ranges import KeyRanges, index_of, ranges_between
from longnet.attention.sharding.attend import rows_backward
from longnet.attention.sharding.exchange import send
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
    """

    sent: tuple[tuple[Keys, ...], ...]
    received: tuple[tuple[Keys, ...], ...]
    read: tuple[tuple[KeyPart, KeyRanges], ...]


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


def channels(inputs: AttentionInputs) -> int:
    """Of a row that travels: a key, a value, and with a mask 1 for padding."""
    return 2 * inputs.query.shape[-1] + (inputs.mask is not None)


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
        return RangePlan(sent, received, tuple((part, _read(place, part, torch.cat(p))) for part, p in pieces.items()))


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


@dataclass(frozen=True)
class _Grid:
    """The rows of the batch with one offset of the grid, and their place."""

    rows: Any
    inputs: AttentionInputs
    place: Place

    @cached_property
    def plan(self) -> RangePlan:
        return range_plan(self.place)

    @property
    def start(self) -> int:
        return self.place.shards.start(self.place.rank)

    @property
    def own(self) -> AttentionInputs:
        """The shard as a sequence of its own."""
        on_grid = self.place.pattern.least_offset(self.place.segment_offset + self.start)
        return self.inputs.with_spec(segment_offset=on_grid)

    def index(self, heads: Sequence[int] | Tensor, positions: Tensor) -> tuple[slice, Any, Any]:
        """The index of heads and positions in the shard's tensors."""
        return index_of(torch.as_tensor(heads, device="cpu"), positions - self.start, self.inputs.query.device)

    def call(self, part: KeyPart, ranges: KeyRanges, remote: Tensor) -> Rows:
        """The shard's queries and received keys (B, kv_heads, b, channels)."""
        inputs, dim, padded = self.inputs, self.inputs.query.shape[-1], None
        kind = lse_dtype(inputs.query.dtype)
        query = inputs.query[self.index(ranges.heads, ranges.queries)].to(kind)
        key, value = remote[..., :dim].to(kind), remote[..., dim : 2 * dim].to(kind)
        if inputs.mask is not None:
            padded = remote[..., 2 * dim] != 0
            # A NaN must not reach 0 * key.
            key = key.masked_fill(padded[..., None], 0.0)
            padded = padded.repeat_interleave(part.share, 1).flatten(0, 1)
        key, value = (x.repeat_interleave(part.share, 1).flatten(0, 1) for x in (key, value))
        bias = None if inputs.bias is None else inputs.bias[ranges.heads.to(inputs.bias.device)].to(kind)
        return Rows(query.flatten(0, 1), key, value, inputs.spec.scale, padded=padded, bias=bias, ranges=ranges)


# By grid: keys and the part of a buffer that holds them, (B, kv_heads, b, channels).
_Views = list[list[tuple[Keys, Tensor]]]


class RangeShard:
    """One rank's part of a call: its own tokens, n of N.

    Args:
        inputs: without offsets of their own.
        place: with the offset of all rows.
        offsets: of each row of the batch, in place of the one of all; empty for none.
    """

    def __init__(
        self,
        inputs: AttentionInputs,
        place: Place,
        backend: Backend,
        group: dist.ProcessGroup,
        offsets: tuple[int, ...],
    ) -> None:
        self.inputs, self.place, self.backend, self.group = inputs, place, backend, group
        self.grids = [_Grid(slice(None), inputs, place)]
        if offsets:
            self.grids = []
            for value in sorted(set(offsets)):
                rows = torch.tensor([row for row, own in enumerate(offsets) if own == value], device="cpu")
                rows = rows.to(inputs.query.device)
                self.grids.append(_Grid(rows, inputs.rows(rows, value), replace(place, segment_offset=value)))

        batches = {grid.place.segment_offset: grid.inputs.query.shape[0] for grid in self.grids}
        self.sent, self.received = (rows_exchanged(place, batches, sent) for sent in (True, False))

    def _views(self, buffer: Tensor, sent: bool) -> _Views:
        """A buffer (rows, channels), ordered by rank, grid, part, and batch."""
        found: _Views = [[] for _ in self.grids]
        first = 0
        for rank in range(len(self.place.shards.lengths)):
            for grid, views in zip(self.grids, found, strict=True):
                for keys in (grid.plan.sent if sent else grid.plan.received)[rank]:
                    shape = grid.inputs.query.shape[0], len(keys.part.kv_heads), len(keys.positions)
                    last = first + shape[0] * shape[1] * shape[2]
                    views.append((keys, buffer[first:last].view(*shape, buffer.shape[1])))
                    first = last
        assert first == len(buffer)
        return found

    def _packed(self) -> Tensor:
        """The rows that others need."""
        packed = self.inputs.key.new_empty(sum(self.sent), channels(self.inputs))
        for grid, views in zip(self.grids, self._views(packed, True), strict=True):
            for keys, rows in views:
                index = grid.index(keys.part.kv_heads, keys.positions)
                dim = grid.inputs.key.shape[-1]
                rows[..., :dim], rows[..., dim : 2 * dim] = grid.inputs.key[index], grid.inputs.value[index]
                if grid.inputs.mask is not None:
                    rows[..., 2 * dim] = grid.inputs.mask[:, None, index[2]]
        return packed

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """(out like query, lse (B, H, n), the rows received, (rows, channels))."""
        transfer = send(self._packed(), self.sent, self.received, self.group)
        results = [self.backend.run(grid.own) for grid in self.grids]
        received = transfer.wait()
        out, lse = self.inputs.empty_outputs()
        for grid, views, (own_out, own_lse) in zip(self.grids, self._views(received, False), results, strict=True):
            mixed, mixed_lse, remote = own_out.to(own_lse.dtype), own_lse, _by_part(views)
            for part, ranges in grid.plan.read:
                index = grid.index(ranges.heads, ranges.queries)
                found, found_lse = grid.call(part, ranges, torch.cat(remote[part], 2)).forward()
                rows, rows_lse = mixed[index], mixed_lse[index]
                merge.merge_(rows, rows_lse, found.view(rows.shape), found_lse.view(rows_lse.shape))
                mixed[index], mixed_lse[index] = rows, rows_lse
            out[grid.rows], lse[grid.rows] = mixed.to(out.dtype), mixed_lse
        return out, lse, received

    def backward(self, saved: SavedForward, grad_out: Tensor, grad_lse: Tensor | None, received: Tensor) -> Gradients:
        """Gradients of the inputs; of a bias this rank's share."""
        kind, dim = saved.lse.dtype, grad_out.shape[-1]
        grads = self.inputs.empty_gradients()
        grad_bias = torch.zeros_like(grads.bias, dtype=kind)

        def rows_of(grid: _Grid) -> tuple[SavedForward, Tensor, Tensor | None]:
            out, lse, grad = (x[grid.rows] for x in (saved.out, saved.lse, grad_out))
            return SavedForward(grid.own, out, lse), grad, None if grad_lse is None else grad_lse[grid.rows]

        # What others wait for comes first, and travels while the rest is computed. Each row is written once.
        returned = received.new_empty(len(received), 2 * dim, dtype=kind)
        query_grads: list[list[tuple[Any, Tensor]]] = [[] for _ in self.grids]
        buffers = zip(self._views(received, False), self._views(returned, False), query_grads, strict=True)
        for grid, (views, targets, of_queries) in zip(self.grids, buffers, strict=True):
            forward, grad, of_lse = rows_of(grid)
            remote, places = _by_part(views), _by_part(targets)
            for part, ranges in grid.plan.read:
                index = grid.index(ranges.heads, ranges.queries)
                call = grid.call(part, ranges, torch.cat(remote[part], 2))
                grad_q, grad_kv, by_distance = rows_backward(call, index, forward, grad, of_lse, part.share)
                of_queries.append((index, grad_q))
                sizes = [rows.shape[2] for rows in places[part]]
                for rows, own in zip(places[part], grad_kv.split(sizes, 2), strict=True):
                    rows.copy_(own)
                if by_distance is not None:
                    grad_bias[ranges.heads.to(grad_bias.device)] += by_distance
        transfer = send(returned.to(grad_out.dtype), self.received, self.sent, self.group)

        totals = []
        for grid, of_queries in zip(self.grids, query_grads, strict=True):
            *own, own_bias = self.backend.run_backward(*rows_of(grid))
            totals.append([x.to(kind) for x in own])
            grad_bias += own_bias
            for index, grad_q in of_queries:
                # The queries of a part are all different.
                totals[-1][0][index] += grad_q
        for grid, total, views in zip(self.grids, totals, self._views(transfer.wait(), True), strict=True):
            for keys, rows in views:
                index = grid.index(keys.part.kv_heads, keys.positions)
                for target, half in zip(total[1:], rows.to(kind).split(dim, -1), strict=True):
                    target[index] += half
            for grad, found in zip(grads[:3], total, strict=True):
                grad[grid.rows] = found.to(grad.dtype)
        grads.bias.copy_(grad_bias)
        return grads


def _by_part(views: list[tuple[Keys, Tensor]]) -> dict[KeyPart, list[Tensor]]:
    """The buffers of each part's keys, in order."""
    found: dict[KeyPart, list[Tensor]] = {}
    for keys, rows in views:
        found.setdefault(keys.part, []).append(rows)
    return found
