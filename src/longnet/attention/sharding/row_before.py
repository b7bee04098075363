"""The last row of the rank before: what a layer that shifts its tokens by one needs at the start of a shard."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longnet.attention.call import check_tensor
from longnet.attention.sharding.exchange import send
from longnet.attention.sharding.group import DTYPES, Peers, Terms, agree, broadcast_error, peers_of
from longnet.geometry.shards import Shards
from longnet.runtime.tracing import untraced

_TYPES = "float64, float32, bfloat16 or float16"


# Ranks talk here: nothing that a graph could hold.
@untraced
def row_before(x: Tensor, group: Any) -> Tensor:
    """The row before this rank's first one: the last row of the nearest rank before that has any.

    Differentiable: its backward pass sends the gradient back. Every rank of the group makes the call, and runs its backward pass
    if one does.

    Args:
        x: (B, h, n, d), this rank's shard of a sequence, in rank order; n may be 0.
        group: a ``ProcessGroup`` or a ``DeviceMesh`` of one dimension.

    Returns:
        (B, h, 1, d) like x; zeros where no rank before has a row.

    Raises:
        TypeError, ValueError: x is no tensor of four dimensions and a floating type; on every rank, when one raises or ranks
            differ in anything but n.
    """
    peers = peers_of(group)
    try:
        check_tensor("x", x, "(B, h, n, d)", _TYPES)
        if x.dtype not in DTYPES:
            raise TypeError(f"x has dtype {x.dtype}: expected {_TYPES}")
    except (TypeError, ValueError) as error:
        broadcast_error(peers, error)
        raise
    batch, heads, length, dim = x.shape
    terms = Terms(batch, heads, dim, x.dtype, torch.is_grad_enabled() and x.requires_grad)
    shards = agree(peers, length, terms)
    row: Tensor = _RowBefore.apply(x, peers, shards)
    return row


def _neighbours(peers: Peers, shards: Shards) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows (sent to, received from) every rank, 0 or 1."""

    def sends(source: int, target: int) -> int:
        between = shards.lengths[source + 1 : target]
        return int(source < target and shards.lengths[source] > 0 and not any(between))

    ranks = range(peers.size)
    return tuple(sends(peers.rank, one) for one in ranks), tuple(sends(one, peers.rank) for one in ranks)


class _RowBefore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers, shards: Shards) -> Tensor:
        ctx.peers, ctx.shape = peers, x.shape
        ctx.sent, ctx.received = _neighbours(peers, shards)
        shape = (x.shape[0], x.shape[1], 1, x.shape[3])
        # Shards that send have a row.
        last = x[:, :, -1:].expand(sum(ctx.sent), *shape).contiguous() if any(ctx.sent) else x.new_empty(0, *shape)
        rows = send(last, ctx.sent, ctx.received, peers.group).wait()
        return rows[0] if len(rows) else x.new_zeros(shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        mine = grad[None].expand(sum(ctx.received), -1, -1, -1, -1).contiguous()
        rows = send(mine, ctx.received, ctx.sent, ctx.peers.group).wait()
        grad_x = grad.new_zeros(ctx.shape)
        if len(rows):
            grad_x[:, :, -1:] = rows.sum(0)
        return grad_x, None, None
