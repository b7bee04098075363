"""A rank's shard of attention beyond the paper: windows, all queries, blocks, segments without end, other grids.

The shard's own part is an ordinary call: a shard that starts at ``p`` is a sequence on a grid that is offset by ``p``. What of
other ranks its queries read is planned in :mod:`longnet.attention.sharding.range_plan`. As in
:mod:`longnet.attention.sharding.attend` all parts are mixed into one softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longnet.attention import merge
from longnet.attention.backends import Backend
from longnet.attention.call import AttentionInputs, Gradients, SavedForward, lse_dtype
from longnet.attention.chunked import Rows
from longnet.attention.key_ranges import Positions, index_of, tensor_of
from longnet.attention.sharding.attend import rows_backward
from longnet.attention.sharding.exchange import send
from longnet.attention.sharding.ordinary import LEAST_ROWS, OrdinaryCall, rectangle_call, triangle_call
from longnet.attention.sharding.plan import Place
from longnet.attention.sharding.range_plan import Keys, RangePlan, Reading, Reads, range_plan, rows_exchanged
from longnet.geometry.shards import KeyPart


def channels(inputs: AttentionInputs) -> int:
    """Of a row that travels: a key, a value, and with a mask 1 for padding."""
    return 2 * inputs.query.shape[-1] + (inputs.mask is not None)


# Keys and the part of a buffer that holds them, (B, kv_heads, b, channels).
Views = list[tuple[Keys, Tensor]]


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

    def index(self, heads: Sequence[int], positions: Positions) -> tuple[slice, Any, Any]:
        """The index of heads and positions in the shard's tensors."""
        return self.among(range(self.start, self.start + 1), heads, positions)

    def among(self, chosen: Positions, heads: Sequence[int], positions: Positions) -> tuple[slice, Any, Any]:
        """As :meth:`index`, in tensors that hold the ``chosen`` positions alone, or all from the first of a range on."""
        if isinstance(chosen, Tensor):
            places: Positions = torch.searchsorted(chosen, tensor_of(positions))
        elif isinstance(positions, Tensor):
            places = positions - chosen.start
        else:
            places = range(positions.start - chosen.start, positions.stop - chosen.start, positions.step)
        return index_of(torch.as_tensor(heads, device="cpu"), places, self.inputs.query.device)

    def calls(self, backend: Backend, received: Views) -> Iterator[tuple[Reading, Positions, OrdinaryCall | Rows]]:
        """All that queries and received keys say to each other: readings, their queries and the call."""
        remote = _by_part(received)
        for reading in self.plan.read:
            pieces = [remote[reading.part][number] for number in reading.pieces]
            keys = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)
            call = self._call(backend, reading, keys[:, :, reading.rows])
            ranges = call.ranges if isinstance(call, Rows) else None
            yield reading, reading.queries if ranges is None else ranges.queries, call

    def _call(self, backend: Backend, reading: Reading, remote: Tensor) -> OrdinaryCall | Rows:
        """The queries of a reading and its keys (B, kv_heads, b, channels)."""
        inputs, dim, padded, part = self.inputs, self.inputs.query.shape[-1], None, reading.part
        key, value = remote[..., :dim], remote[..., dim : 2 * dim]
        if inputs.mask is not None:
            padded = remote[..., 2 * dim] != 0
        by_ranges = reading.reads is Reads.SOME or inputs.bias is not None
        ranges = reading.ranges(self.place) if by_ranges else None
        queries = reading.queries if ranges is None else ranges.queries
        query = inputs.query[self.index(part.heads, queries)]
        if inputs.bias is None:
            tensors = backend, query, key, value, None if padded is None else padded[:, 0], inputs.spec.scale
            if reading.reads in (Reads.FROM_OWN, Reads.UP_TO_OWN):
                return triangle_call(*tensors, reading.reads is Reads.FROM_OWN)
            if reading.reads is Reads.ALL and min(query.shape[2], key.shape[2]) >= LEAST_ROWS:
                return rectangle_call(*tensors)
        kind = lse_dtype(inputs.query.dtype)
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
        if padded is not None:
            # A NaN must not reach 0 * key.
            key = key.masked_fill(padded[..., None], 0.0)
            padded = padded.repeat_interleave(part.share, 1).flatten(0, 1)
        key, value = (x.repeat_interleave(part.share, 1).flatten(0, 1) for x in (key, value))
        bias = None if inputs.bias is None else inputs.bias[list(part.heads)].to(kind)
        return Rows(query.flatten(0, 1), key, value, inputs.spec.scale, padded=padded, bias=bias, ranges=ranges)


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

    def _views(self, buffer: Tensor, sent: bool) -> list[Views]:
        """By grid, a buffer (rows, channels), ordered by rank, grid, part, and batch."""
        found: list[Views] = [[] for _ in self.grids]
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
        for grid, views, (own_out, own_lse) in zip(self.grids, self._views(received, False), results, strict=True):
            # Few rows of a window read what was received: the others stay as they are.
            chosen = grid.plan.queries
            touched = grid.index(range(own_out.shape[1]), chosen)
            mixed, mixed_lse = own_out[touched].to(own_lse.dtype), own_lse[touched]
            for reading, queries, call in grid.calls(self.backend, views):
                index = grid.among(chosen, reading.part.heads, queries)
                found, found_lse = call.forward()
                rows, rows_lse = mixed[index], mixed_lse[index]
                merge.merge_(rows, rows_lse, found.view(rows.shape), found_lse.view(rows_lse.shape))
                mixed[index], mixed_lse[index] = rows, rows_lse
            own_out[touched], own_lse[touched] = mixed.to(own_out.dtype), mixed_lse
        return *self._joined(results, self.inputs.empty_outputs), received

    def _joined(self, results: Sequence[tuple[Tensor, ...]], empty: Callable[[], tuple[Tensor, ...]]) -> Any:
        """Tensors (B, ...) from those of every grid."""
        if len(self.grids) == 1:
            return results[0]
        whole = empty()
        for grid, parts in zip(self.grids, results, strict=True):
            for target, rows in zip(whole, parts, strict=True):
                target[grid.rows] = rows
        return whole

    def backward(self, saved: SavedForward, grad_out: Tensor, grad_lse: Tensor | None, received: Tensor) -> Gradients:
        """Gradients of the inputs; of a bias this rank's share."""
        kind, dim = saved.lse.dtype, grad_out.shape[-1]
        bias = saved.inputs.bias
        grad_bias = grad_out.new_zeros(0 if bias is None else bias.shape, dtype=kind)

        def rows_of(grid: _Grid) -> tuple[SavedForward, Tensor, Tensor | None]:
            out, lse, grad = (x[grid.rows] for x in (saved.out, saved.lse, grad_out))
            return SavedForward(grid.own, out, lse), grad, None if grad_lse is None else grad_lse[grid.rows]

        # What others wait for comes first, and travels while the rest is computed.
        returned = received.new_zeros(len(received), 2 * dim, dtype=kind)
        query_grads: list[list[tuple[Any, Tensor]]] = [[] for _ in self.grids]
        buffers = zip(self._views(received, False), self._views(returned, False), query_grads, strict=True)
        for grid, (views, targets, of_queries) in zip(self.grids, buffers, strict=True):
            forward, grad, of_lse = rows_of(grid)
            places = _by_part(targets)
            for reading, queries, call in grid.calls(self.backend, views):
                part = reading.part
                index = grid.index(part.heads, queries)
                grad_q, grad_kv, by_distance = rows_backward(call, index, forward, grad, of_lse, part.share)
                of_queries.append((grid.among(grid.plan.queries, part.heads, queries), grad_q))
                before = -reading.first
                for rows in (places[part][number] for number in reading.pieces):
                    low, high = max(0, -before), min(rows.shape[2], grad_kv.shape[2] - before)
                    if low < high:
                        rows[:, :, low:high] += grad_kv[:, :, before + low : before + high]
                    before += rows.shape[2]
                if by_distance is not None:
                    grad_bias[list(part.heads)] += by_distance
        transfer = send(returned.to(grad_out.dtype), self.received, self.sent, self.group)

        results = []
        for grid, of_queries in zip(self.grids, query_grads, strict=True):
            *own, own_bias = self.backend.run_backward(*rows_of(grid))
            results.append(tuple(own))
            grad_bias += own_bias
            touched = grid.index(range(own[0].shape[1]), grid.plan.queries)
            total = own[0][touched].to(kind)
            for index, grad_q in of_queries:
                # The queries of a part are all different.
                total[index] += grad_q
            own[0][touched] = total.to(own[0].dtype)
        for grid, grads, views in zip(self.grids, results, self._views(transfer.wait(), True), strict=True):
            touched = grid.index(range(grads[1].shape[1]), grid.plan.keys)
            totals = [grad[touched].to(kind) for grad in grads[1:]]
            for keys, rows in views:
                index = grid.among(grid.plan.keys, keys.part.kv_heads, keys.positions)
                for total, half in zip(totals, rows.to(kind).split(dim, -1), strict=True):
                    total[index] += half
            for grad, total in zip(grads[1:], totals, strict=True):
                grad[touched] = total.to(grad.dtype)
        grad_q, grad_k, grad_v = self._joined(results, lambda: self.inputs.empty_gradients()[:3])
        return Gradients(grad_q, grad_k, grad_v, grad_bias if bias is None else grad_bias.to(bias.dtype))


def _by_part(views: Views) -> dict[KeyPart, list[Tensor]]:
    """The buffers of each part's keys, in order."""
    found: dict[KeyPart, list[Tensor]] = {}
    for keys, rows in views:
        found.setdefault(keys.part, []).append(rows)
    return found
