"""One token: a fixed number of tensor operations of fixed shapes, so that a CUDA graph can capture and repeat them.

Nothing here depends on the position but the contents of tensors: masks instead of slices, places computed on the device.
In every branch only a few heads select a position, at most ``ceil(H / r)`` of all H. Each is a *lane*: its row of keys and
values is written, and its query attends to the rows of its segment. Lanes of all branches whose segments hold equally many
rows run together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longnet.attention import merge
from longnet.attention.call import lse_dtype
from longnet.attention.streaming.cache import DilatedCache
from longnet.attention.streaming.tables import StepTables
from longnet.geometry.rows import locate, row_count


def step(query: Tensor, key: Tensor, value: Tensor, cache: DilatedCache, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of the next token, which is then in the cache; ``cache.position_tensor`` counts it, ``cache.position`` not.

    Args:
        query: (B, H, 1, D).
        key, value: (B, Hk, 1, D).

    Returns:
        (B, H, 1, D) in the query's dtype, and the lse (B, H, 1).
    """
    tables, heads = cache.tables, cache.heads
    assert isinstance(tables, StepTables)
    kind = lse_dtype(query.dtype)
    offset, row, start = locate(cache.position_tensor, *tables.grid)  # (branches,)
    listed = torch.minimum(offset, tables.last_offsets)
    lane_offset, lane_row = (x.index_select(0, tables.lane_branch) for x in (listed, row))  # (lanes,)
    head = tables.head_at.index_select(0, tables.lane_starts + lane_offset)
    # Where no head selects this position, a lane stands on head 0's first row and writes back what is there: shapes stay
    # fixed, and nothing changes.
    taken = head >= 0
    head, lane_row = head.clamp_(min=0), torch.where(taken, lane_row, 0)
    first = tables.first_rows.view(-1).index_select(0, tables.lane_branch * heads + head)
    _write(key, cache.keys, first + lane_row, head, taken, cache)
    _write(value, cache.values, first + lane_row, head, taken, cache)

    # How many rows of the segment are padding, by batch row: (B, lanes).
    before = cache.padding[:, None] - start.index_select(0, tables.lane_branch)
    padded = row_count(before.clamp_(min=0), tables.grid[1].index_select(0, tables.lane_branch))
    queries = query[:, :, 0].index_select(1, head)  # (B, lanes, D)
    outs, lses, low = [], [], 0
    for count, width in tables.families:
        lane = slice(low, low + count)
        part = _attend(queries[:, lane], first[lane], lane_row[lane], padded[:, lane], width, cache, scale)
        outs.append(part[0])
        lses.append(part[1])
        low += count
    out, lse = torch.cat(outs, 1), torch.cat(lses, 1)

    # By head: the lane it has in each branch, if it selects this position there.
    absent = tables.offsets != offset[:, None]  # (branches, H)
    lane_of = tables.lane_of.view(-1)
    lse = lse.index_select(1, lane_of).unflatten(1, absent.shape).masked_fill_(absent, -torch.inf)
    out = out.index_select(1, lane_of).unflatten(1, absent.shape).masked_fill_(absent[..., None], 0.0)
    joint = lse.logsumexp(1, keepdim=True)
    total = merge.lse_for_backward(joint)
    out = (out * (lse - total).exp_().unsqueeze(-1)).sum(1)
    cache.position_tensor.add_(1)
    assert out.dtype == kind
    return out.to(query.dtype).unsqueeze(2), joint.transpose(1, 2)


def _write(x: Tensor, storage: Tensor, rows: Tensor, head: Tensor, taken: Tensor, cache: DilatedCache) -> None:
    new = x[:, :, 0].index_select(1, head // (cache.heads // cache.kv_heads))
    # Lanes of one row carry the same values.
    storage.index_copy_(1, rows, torch.where(taken[:, None], new, storage.index_select(1, rows)))


def _attend(
    query: Tensor, first: Tensor, last: Tensor, padded: Tensor, width: int, cache: DilatedCache, scale: float
) -> tuple[Tensor, Tensor]:
    """(B, lanes, D) queries to rows ``first + padded .. first + last`` of the storage: out and lse (B, lanes)."""
    kind = lse_dtype(query.dtype)
    number = torch.arange(width, device=query.device)
    rows = (first[:, None] + number).clamp_(max=cache.layout.rows - 1)
    key, value = (
        x.index_select(1, rows.view(-1)).unflatten(1, rows.shape).to(kind) for x in (cache.keys, cache.values)
    )
    hidden = (number > last[:, None]) | (number < padded[..., None])  # (B, lanes, width)
    scores = (key @ (query.to(kind) * scale).unsqueeze(-1)).squeeze(-1).masked_fill_(hidden, -torch.inf)
    # Hidden rows may hold anything, a NaN perhaps, which must not reach 0 * value.
    value = value.masked_fill_(hidden.unsqueeze(-1), 0.0)
    lse = scores.logsumexp(-1)
    weights = scores.sub_(merge.lse_for_backward(lse).unsqueeze(-1)).exp_()
    return (weights.unsqueeze(-2) @ value).squeeze(-2), lse
