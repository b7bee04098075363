"""A rank's shard of attention beyond the paper: windows, all queries, blocks, segments without end, other grids.

The shard's own part is an ordinary call: a shard that starts at ``p`` is a sequence on a grid that is offset by ``p``. What of
other ranks its queries read is planned in :mod:`longnet.attention.sharding.range_plan`. As in
:mod:`longnet.attention.sharding.attend` all parts are mixed into one softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from longnet.attention.key_ranges import KeyRanges, index_of
from longnet.attention.sharding.attend import rows_backward
from longnet.attention.sharding.exchange import send
from longnet.attention.sharding.plan import Place
from longnet.attention.sharding.range_plan import Keys, RangePlan, range_plan, rows_exchanged
from longnet.geometry.shards import KeyPart


def channels(inputs: AttentionInputs) -> int:
    """Of a row that travels: a key, a value, and with a mask 1 for padding."""
    return 2 * inputs.query.shape[-1] + (inputs.mask is not None)


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

    def among(self, chosen: Tensor, heads: Sequence[int] | Tensor, positions: Tensor) -> tuple[slice, Any, Any]:
        """As :meth:`index`, in tensors that hold the ``chosen`` positions alone."""
        places = torch.searchsorted(chosen, positions)
        return index_of(torch.as_tensor(heads, device="cpu"), places, self.inputs.query.device)

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
        for grid, views, (own_out, own_lse) in zip(self.grids, self._views(received, False), results, strict=True):
            # Few rows read what was received: the others stay as they are.
            chosen, remote = grid.plan.queries, _by_part(views)
            touched = grid.index(range(own_out.shape[1]), chosen)
            mixed, mixed_lse = own_out[touched].to(own_lse.dtype), own_lse[touched]
            for part, ranges in grid.plan.read:
                index = grid.among(chosen, ranges.heads, ranges.queries)
                found, found_lse = grid.call(part, ranges, torch.cat(remote[part], 2)).forward()
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
                of_queries.append((grid.among(grid.plan.queries, ranges.heads, ranges.queries), grad_q))
                sizes = [rows.shape[2] for rows in places[part]]
                for rows, own in zip(places[part], grad_kv.split(sizes, 2), strict=True):
                    rows.copy_(own)
                if by_distance is not None:
                    grad_bias[ranges.heads.to(grad_bias.device)] += by_distance
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


def _by_part(views: list[tuple[Keys, Tensor]]) -> dict[KeyPart, list[Tensor]]:
    """The buffers of each part's keys, in order."""
    found: dict[KeyPart, list[Tensor]] = {}
    for keys, rows in views:
        found.setdefault(keys.part, []).append(rows)
    return found
