"""One token where queries read bands: a fixed number of tensor operations of fixed shapes, for CUDA graphs.

As :mod:`longnet.attention.streaming.step`, nothing depends on the position but the contents of tensors; rows of the batch may
stand on different grids. On the CPU, which waits for bytes and not for launches, only rows that hold something are read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longnet.attention import merge
from longnet.attention.call import lse_dtype
from longnet.attention.streaming.band_tables import BandTables
from longnet.attention.streaming.cache import DilatedCache
from longnet.geometry import Branch
from longnet.geometry.layout import Block
from longnet.geometry.rows import UNBOUNDED


def band_step(query: Tensor, key: Tensor, value: Tensor, cache: DilatedCache, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of the next token, which is then in the cache; ``cache.position_tensor`` counts it, ``cache.position`` not.

    Args:
        query: (B, H, 1, D).
        key, value: (B, Hk, 1, D).

    Returns:
        (B, H, 1, D) in the query's dtype, and the lse (B, H, 1).
    """
    kind = lse_dtype(query.dtype)
    q, few = query[:, :, 0].to(kind) * scale, _reads_few(query.device)
    assert isinstance(cache.tables, BandTables)
    kept = cache._kept_rows(cache.position, cache._row_offsets)
    indices = iter(cache.tables.heads)
    outs, lses = [], []
    for branch, blocks, is_ring in cache.layout.bands:
        # Each head has one block in a band.
        band_out, band_lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf)
        for block in blocks:
            most = max(high for _, high in next(kept)) + 1
            read = min(most, block.rows) if few else block.rows
            heads, kv_heads = next(indices)
            new = key[:, kv_heads, 0], value[:, kv_heads, 0]
            band_out[:, heads], band_lse[:, heads] = _attend(q[:, heads], *new, cache, branch, block, is_ring, read)
        outs.append(band_out)
        lses.append(band_lse)
    out, lse = torch.stack(outs, 1), torch.stack(lses, 1)  # (B, bands, H, D), (B, bands, H)
    joint = lse.logsumexp(1, keepdim=True)
    weights = (lse - merge.lse_for_backward(joint)).exp_()
    out = (out * weights.unsqueeze(-1)).sum(1)
    cache.position_tensor.add_(1)
    return out.to(query.dtype).unsqueeze(2), joint.transpose(1, 2)


def _reads_few(device: torch.device) -> bool:
    """Whether to leave out rows that hold nothing, by what the host knows."""
    return device.type == "cpu"


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: DilatedCache,
    branch: Branch,
    block: Block,
    is_ring: bool,
    read: int,
) -> tuple[Tensor, Tensor]:
    """Scaled queries (B, heads of the block, D) to the first ``read`` rows, once the new token's are written: out and lse.

    Args:
        key, value: (B, key/value heads of the block, D), the new token's.
    """
    row, selected, hidden, last = _place(cache, branch, block, is_ring)
    keys, values = cache._rows_of(block, 0, read)
    writes = selected & (row < read)
    at, batch = row.clamp(0, read - 1), torch.arange(len(row), device=row.device)
    for rows, new in ((keys, key), (values, value)):
        rows[batch, :, at] = torch.where(writes[:, None, None], new, rows[batch, :, at])
    number = torch.arange(read, device=row.device)
    if is_ring:
        # The latest position of each row: before the first token, or padding, it holds nothing.
        unread = cache.position_tensor - branch.place_of(cache.position_tensor - number) < cache.padding[:, None]
    else:
        unread = (number < hidden[:, None]) | (number >= last[:, None])  # (B, rows)
    if cache.pattern.dilated_queries and not is_ring:
        unread = unread | ~selected[:, None]
    q = query.unflatten(1, (block.kv_count, block.share))
    scores = (q @ keys.to(q.dtype).transpose(-1, -2)).masked_fill_(unread[:, None, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = scores.sub_(merge.lse_for_backward(lse).unsqueeze(-1)).exp_()
    # Rows that are not read may hold anything, a NaN perhaps, which must not reach 0 * value.
    out = weights @ values.to(q.dtype).masked_fill(unread[:, None, :, None], 0.0)
    return out.flatten(1, 2), lse.flatten(1, 2)


def _place(cache: DilatedCache, branch: Branch, block: Block, is_ring: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each batch row (B,): the new token's row, whether it has one, the first row to read, the row after the last."""
    position, offset = cache.position_tensor.expand(cache.batch_size), block.offset
    if is_ring:
        row = branch.place_of(position)
        return row, torch.ones_like(row, dtype=torch.bool), row, row
    if cache.offsets is None:
        origin = torch.zeros_like(position)
    else:
        origin = branch.origin(cache.offsets)
    place = branch.place_of(position + origin)
    base = branch.chosen_before(origin, offset) if branch.segment_length == UNBOUNDED else torch.zeros_like(origin)
    row = branch.chosen_before(place, offset) - base
    selected = branch.selects(position + origin, offset)
    # The segment begins at position - place, which may be before the first token.
    before = (cache.padding - (position - place)).clamp(min=0)
    return row, selected, branch.chosen_before(before, offset) - base, row + selected
