"""A rank's shard of dilated attention, forward and backward, on real tensors.

Every query of the shard attends to keys of the shard and of others. Parts of that are ordinary calls of a backend; the rest
are rows against rows. All parts are mixed by their softmax denominators into one softmax, and by the rule of
:mod:`longnet.attention.merge` the backward pass runs every part by itself with the mixed out and lse.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longnet.attention import merge
from longnet.attention.backends import Backend
from longnet.attention.call import AttentionInputs, Gradients, SavedForward, lse_dtype
from longnet.attention.chunked import Rows
from longnet.attention.sharding.exchange import pack, send
from longnet.attention.sharding.ordinary import LEAST_ROWS, OrdinaryCall, rectangle_call
from longnet.attention.sharding.plan import Place, RowGroup, ShardPlan, make_plan
from longnet.geometry.chunks import OwnPart


@dataclass(frozen=True)
class Shard:
    """One rank's part of a call: its own tokens, n of N, and where they stand."""

    inputs: AttentionInputs
    place: Place
    backend: Backend
    group: dist.ProcessGroup

    @property
    def plan(self) -> ShardPlan:
        return make_plan(self.place, self.inputs.query.device)

    def _part(self, part: OwnPart) -> AttentionInputs:
        """An ordinary call."""
        return self.inputs.tokens(part.tokens).with_spec(pattern=part.pattern)

    def _run_backward(self, part: OwnPart, saved: SavedForward, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        out, lse, grad_out = (x[:, :, part.tokens] for x in (saved.out, saved.lse, grad_out))
        grad_lse = None if grad_lse is None else grad_lse[:, :, part.tokens]
        return self.backend.run_backward(SavedForward(self._part(part), out, lse), grad_out, grad_lse)

    def _call(self, rows: RowGroup, received: Tensor) -> Rows | OrdinaryCall:
        """The call that a group of rows is. ``received`` is (rows, B, channels)."""
        own_query, own_key, own_value, mask, _, own_bias = self.inputs.tensors
        kind, dim = lse_dtype(own_query.dtype), own_query.shape[-1]
        query = own_query[:, rows.heads, rows.tokens]
        if rows.received is not None and mask is None and own_bias is None:
            remote = received[rows.received].movedim(2, 0)
            if min(query.shape[2], remote.shape[2]) >= LEAST_ROWS:
                key, value = remote.split(dim, -1)
                return rectangle_call(self.backend, query, key, value, None, self.inputs.spec.scale)
        query = query.to(kind)
        padded = None
        if rows.received is None:
            key, value = (x[:, rows.key_heads, rows.key_tokens].to(kind) for x in (own_key, own_value))
            if mask is not None:
                padded = mask[:, rows.key_tokens]
        else:
            # (h, b, B, channels) to (B, h, b, channels)
            remote = received[rows.received].movedim(2, 0)
            key, value = remote[..., :dim].to(kind), remote[..., dim : 2 * dim].to(kind)
            if mask is not None:
                padded = remote[..., 2 * dim] != 0
        if padded is not None:
            # A NaN must not reach 0 * key.
            key = key.masked_fill(padded.unsqueeze(-1), 0.0)
        key, value = (x.repeat_interleave(rows.share, 1) for x in (key, value))
        padded = None if padded is None else padded.repeat_interleave(rows.share, 1)
        bias = None
        if own_bias is not None:
            bias = own_bias[rows.heads[:, 0], rows.bias_columns(own_bias)].to(kind)
        query, key, value = (x.flatten(0, 1) for x in (query, key, value))
        padded = None if padded is None else padded.flatten(0, 1)
        return Rows(query, key, value, self.inputs.spec.scale, rows.is_causal, padded, bias)

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """(out like query, lse (B, H, n), the rows received, (rows, B, channels))."""
        plan, own = self.plan, self.inputs
        transfer = send(pack(plan, own.key, own.value, own.mask), plan.sent, plan.received, self.group)
        if plan.is_simple:
            out, lse = self.backend.run(self._part(plan.parts[0]))
        else:
            # Many parts, and each would round.
            out, lse = own.mixture_of_nothing()
            for part in plan.parts:
                merge.merge_(out[:, :, part.tokens], lse[:, :, part.tokens], *self.backend.run(self._part(part)))
        nothing = own.query.new_empty(0)
        for rows in plan.own:
            self._mix(out, lse, rows, nothing)
        received = transfer.wait()
        for rows in plan.remote:
            self._mix(out, lse, rows, received)
        return out if out.dtype == own.query.dtype else torch.empty_like(own.query).copy_(out), lse, received

    def _mix(self, out: Tensor, lse: Tensor, rows: RowGroup, received: Tensor) -> None:
        index = (slice(None), rows.heads, rows.tokens)
        mixed_out, mixed_lse = out[index], lse[index]
        found_out, found_lse = self._call(rows, received).forward()
        merge.merge_(mixed_out, mixed_lse, found_out.view(mixed_out.shape), found_lse.view(mixed_lse.shape))
        out[index], lse[index] = mixed_out, mixed_lse

    def backward(self, saved: SavedForward, grad_out: Tensor, grad_lse: Tensor | None, received: Tensor) -> Gradients:
        """Gradients of the inputs; of a bias this rank's share."""
        own_query, own_bias, plan, kind = self.inputs.query, self.inputs.bias, self.plan, saved.lse.dtype
        grad_bias = own_query.new_empty(0) if own_bias is None else torch.zeros_like(own_bias, dtype=kind)
        query_grads = []

        def group_backward(rows: RowGroup) -> Tensor:
            """Gradients of the group's keys and values, (B, h / share, b, 2 D); those of its queries go to ``query_grads``."""
            index, call = (slice(None), rows.heads, rows.tokens), self._call(rows, received)
            grad_q, grad_kv, by_distance = rows_backward(call, index, saved, grad_out, grad_lse, rows.share)
            query_grads.append((rows, grad_q))
            if by_distance is not None:
                grad_bias[rows.heads[:, 0], rows.bias_columns(grad_bias)] += by_distance
            return grad_kv

        # What others wait for comes first, and travels while the rest is computed.
        dim = own_query.shape[-1]
        returned = torch.zeros(*received.shape[:2], 2 * dim, dtype=kind, device=received.device)
        for rows in plan.remote:
            assert rows.received is not None
            # No row is twice in a group, so sums have one order on every device.
            returned[rows.received] += group_backward(rows).movedim(0, 2)
        transfer = send(returned.to(own_query.dtype), plan.received, plan.sent, self.group)

        inputs = (own_query, self.inputs.key, self.inputs.value)
        grads = [] if plan.is_simple else [torch.zeros_like(x, dtype=kind) for x in inputs]
        for part in plan.parts:
            *part_grads, part_bias = self._run_backward(part, saved, grad_out, grad_lse)
            if plan.is_simple:
                grads = part_grads
            else:
                for grad, more in zip(grads, part_grads, strict=True):
                    grad[:, :, part.tokens] += more
            if own_bias is not None:
                grad_bias += part_bias
        for rows in plan.own:
            assert rows.key_tokens is not None
            more = group_backward(rows)
            for grad, half in zip(grads[1:], more.split(dim, -1), strict=True):
                grad[:, rows.key_heads, rows.key_tokens] += half
        for rows, grad_q in query_grads:
            # The queries of a group are all different.
            index = (slice(None), rows.heads, rows.tokens)
            grads[0][index] = (grads[0][index].to(kind) + grad_q).to(grads[0].dtype)
        back = transfer.wait().to(kind)
        summed = back.new_zeros(len(plan.places), *back.shape[1:])
        for place_of, run in zip(plan.place_of.split(plan.runs), back.split(plan.runs), strict=True):
            summed[place_of] += run
        place = (slice(None), plan.places[:, 0], plan.places[:, 1])
        for grad, half in zip(grads[1:], summed.transpose(0, 1).split(dim, -1), strict=True):
            grad[place] = (grad[place].to(kind) + half).to(grad.dtype)
        grad_q, grad_k, grad_v = (
            g if g.dtype == x.dtype else torch.empty_like(x).copy_(g) for x, g in zip(inputs, grads, strict=True)
        )
        return Gradients(grad_q, grad_k, grad_v, grad_bias if own_bias is None else grad_bias.to(own_bias.dtype))


def rows_backward(
    call: Rows | OrdinaryCall,
    index: tuple[Any, Any, Any],
    saved: SavedForward,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    share: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of rows against rows that are a part of the joint softmax.

    Args:
        call: of a queries and b keys, for h heads.
        index: of the queries in (B, H, n, ...) tensors.
        share: neighbouring heads that read the same keys.

    Returns:
        those of the queries (B, h, a, D), of the keys and values (B, h / share, b, 2 D), and of the bias or None.
    """
    if isinstance(call, OrdinaryCall):
        of_lse = None if grad_lse is None else grad_lse[index]
        return *call.backward(saved.out[index], saved.lse[index], grad_out[index], of_lse), None
    # Of these rows alone: over a whole shard it would cost as much as an eighth of the attention.
    grad_rows, mixed = (x[index].to(saved.lse.dtype) for x in (grad_out, saved.out))
    # Below neither may be inferred: the other may be 0.
    batch, heads = grad_rows.shape[:2]
    grad_rows, mixed = grad_rows.flatten(0, 1), mixed.flatten(0, 1)
    grad_lse_rows = None if grad_lse is None else grad_lse[index].flatten(0, 1)
    query, mixed, mixed_lse = merge.rows_for_backward(
        grad_rows, grad_lse_rows, call.query, mixed, saved.lse[index].flatten(0, 1)
    )
    delta = (grad_rows * mixed).sum(-1)
    if grad_lse_rows is not None:
        delta -= grad_lse_rows
    grad_q, grad_k, grad_v, by_distance = replace(call, query=query).backward(grad_rows, mixed_lse, delta)
    grad_kv = torch.cat((grad_k, grad_v), -1).unflatten(0, (batch, heads // share, share)).sum(2)
    return grad_q.unflatten(0, (batch, heads)), grad_kv, by_distance
