"""A chunk of any length where queries read bands: windows, strided keys, blocks, segments without end, offset grids.

The chunk's own keys are the operation on the chunk, on the grid as it stands there. Keys read before are a rectangle in a
branch: every query up to the end of the segment in which the chunk starts reads all of them. In a window a query reads those
at distances below W. The parts are mixed by their softmax denominators.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from longnet.attention import merge
from longnet.attention.backends import Backend, find_backend, select_backend
from longnet.attention.call import AttentionInputs, AttentionSpec, lse_dtype
from longnet.attention.chunked import Rows
from longnet.attention.key_ranges import KeyRanges
from longnet.attention.streaming.cache import DilatedCache
from longnet.attention.streaming.rectangle import rectangle_attention
from longnet.geometry import Branch
from longnet.geometry.layout import Block

# Of one axis of a tensor.
Index = slice | Tensor


def attend_band_chunk(
    query: Tensor, key: Tensor, value: Tensor, cache: DilatedCache, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of the next T >= 1 tokens, whose keys and values are then in the cache, and counted.

    Args:
        query: (B, H, T, D).
        key, value: (B, Hk, T, D).

    Returns:
        (B, H, T, D) in the query's dtype, and the lse (B, H, T).
    """
    start, length = cache.position, query.shape[2]
    padded = cache._padded(length)
    same = len(set(cache._row_offsets)) == 1
    # The least offset, so that chunks at one place of the grid have one plan.
    pattern = cache._pattern_of_chunk()
    place = pattern.least_offset(cache._row_offsets[0] + start) if same else 0
    spec = AttentionSpec(pattern, True, scale, segment_offset=place)
    offsets = None if same or cache.offsets is None else cache.offsets + start
    chunk = AttentionInputs(query, key, value, padded, None, spec, offsets)
    out, lse = _own_part(chunk, cache)
    # Before the first tokens nothing is kept that would be mixed in.
    mixture = out.to(lse.dtype) if start else out, lse
    _add_ring(mixture, chunk, cache)
    for rows, offset in _grids(cache):
        for branch, blocks in cache.layout.branches:
            for block in blocks:
                _add_block(mixture, chunk, cache, rows, branch, block, branch.origin(offset))
    with cache._writing():
        _store_ring(chunk, cache)
        for rows, offset in _grids(cache):
            for branch, blocks in cache.layout.branches:
                for block in blocks:
                    _store_block(chunk, cache, rows, branch, block, branch.origin(offset))
        cache.moved(length)
    return mixture[0].to(query.dtype), lse


def _own_part(chunk: AttentionInputs, cache: DilatedCache) -> tuple[Tensor, Tensor]:
    """(out, lse) of the chunk's tokens among themselves."""
    if chunk.offsets is None or isinstance(find_backend(cache.backend, chunk), Backend):
        return select_backend(cache.backend, chunk).run(chunk)
    # Backends that would have to wait for the offsets of all rows (of float64 on a GPU, say) take one grid at a time.
    out, lse = chunk.empty_outputs()
    for rows, offset in _grids(cache):
        assert isinstance(rows, Tensor)
        same = chunk.rows(rows, cache._pattern_of_chunk().least_offset(offset + cache.position))
        out[rows], lse[rows] = select_backend(cache.backend, same).run(same)
    return out, lse


def _grids(cache: DilatedCache) -> Iterator[tuple[Index, int]]:
    """(batch rows, their offset), for each offset that there is."""
    offsets = cache._row_offsets
    for offset in sorted(set(offsets)):
        rows = [row for row, own in enumerate(offsets) if own == offset]
        yield slice(None) if len(rows) == len(offsets) else torch.tensor(rows, device=cache.device), offset


def _selected(cache: DilatedCache, branch: Branch, offset: int, origin: int, first: int, last: int) -> Index:
    """The positions that a head selects, all of one segment, as an index of tokens from the cache's position on."""
    start = cache.position
    if branch.block == 1:
        rows = branch.selected(first + origin, last + origin, offset)
        return rows.tokens(start + origin) if rows.size else slice(0, 0)
    position = torch.arange(first, last, device=cache.device)
    return position[branch.selects(position + origin, offset)] - start


def _taken(x: Tensor, rows: Index, heads: Any, tokens: Index) -> Tensor:
    """Some batch rows, heads and tokens of (B, H, N, ...): a view where all are slices."""
    return x[rows][:, heads][:, :, tokens]


def _mix(mixture: tuple[Tensor, Tensor], rows: Index, heads: Any, tokens: Index, out: Tensor, lse: Tensor) -> None:
    """Mix (out, lse) of some batch rows, heads and tokens in."""
    parts = _taken(mixture[0], rows, heads, tokens), _taken(mixture[1], rows, heads, tokens)
    merge.merge_(*parts, out, lse)
    if isinstance(rows, slice) and isinstance(heads, slice) and isinstance(tokens, slice):
        return
    index = [
        torch.arange(size, device=out.device)[own]
        for size, own in zip(mixture[1].shape, (rows, heads, tokens), strict=True)
    ]
    place = index[0][:, None, None], index[1][:, None], index[2]
    for whole, part in zip(mixture, parts, strict=True):
        whole[place] = part


def _add_block(
    mixture: tuple[Tensor, Tensor],
    chunk: AttentionInputs,
    cache: DilatedCache,
    rows: Index,
    branch: Branch,
    block: Block,
    origin: int,
) -> None:
    """Mix in what the chunk reads of a block's rows."""
    start, end = cache.position, cache.position + chunk.length
    low, high = branch.kept_rows(start, block.offset, origin)
    stop = min(end, branch.segment_stop(start + origin) - origin)
    tokens: Index = slice(0, stop - start)
    if cache.pattern.dilated_queries:
        tokens = _selected(cache, branch, block.offset, origin, start, stop)
    query = _taken(chunk.query, rows, block.heads, tokens)
    if low >= high or not query.shape[2]:
        return
    key, value = (x[rows] for x in cache._rows_of(block, low, high))
    padded = None
    if cache._most_padding > 0:
        number = torch.arange(low, high, device=cache.device) + branch.first_row(block.offset, origin)
        segment = branch.segment_start(start + origin) - origin
        padded = segment + branch.place_of_row(number, block.offset) < cache.padding[rows, None]
    found = rectangle_attention(query, key, value, chunk.spec.scale, padded, cache.backend)
    _mix(mixture, rows, block.heads, tokens, *found)


def _add_ring(mixture: tuple[Tensor, Tensor], chunk: AttentionInputs, cache: DilatedCache) -> None:
    """Mix in what the chunk reads of the window's rows."""
    if cache.layout.ring is None:
        return
    (ring, block), start = cache.layout.ring, cache.position
    count, tokens = min(start, block.rows - 1), min(chunk.length, block.rows - 1)
    if not count:
        return
    kind, share = lse_dtype(chunk.query.dtype), block.share
    position = torch.arange(start - count, start, device=cache.device)
    place = ring.place_of(position)
    key, value = (x[:, :, place].to(kind).flatten(0, 1) for x in cache._rows_of(block, 0, block.rows))
    # Heads that share keys are more queries, token by token.
    query = chunk.query[:, :, :tokens].to(kind).unflatten(1, (-1, share)).transpose(2, 3).flatten(2, 3).flatten(0, 1)
    low = (torch.arange(tokens, device="cpu") + (count + 1 - block.rows)).clamp_(min=0).repeat_interleave(share)
    ranges = KeyRanges(torch.arange(cache.heads, device="cpu"), low, low, low, torch.full_like(low, count))
    padded = None
    if cache._most_padding > start - count:
        padded = (position < cache.padding[:, None]).repeat_interleave(cache.kv_heads, 0)
        key = key.masked_fill(padded[..., None], 0.0)
    parts = Rows(query, key, value, chunk.spec.scale, padded=padded, ranges=ranges).forward()
    out, lse = (
        x.unflatten(1, (tokens, share)).unflatten(0, (-1, cache.kv_heads)).transpose(2, 3).flatten(1, 2) for x in parts
    )
    _mix(mixture, slice(None), slice(None), slice(0, tokens), out, lse)


def _store_block(
    chunk: AttentionInputs, cache: DilatedCache, rows: Index, branch: Branch, block: Block, origin: int
) -> None:
    """Write the chunk's rows of the segment that goes on after it."""
    start, end = cache.position, cache.position + chunk.length
    first = max(start, branch.segment_start(end + origin) - origin)
    if first == end:
        return
    low, high = (branch.kept_rows(position, block.offset, origin)[1] for position in (first, end))
    tokens = _selected(cache, branch, block.offset, origin, first, end)
    for target, new in zip(cache._rows_of(block, low, high), (chunk.key, chunk.value), strict=True):
        target[rows] = _taken(new, rows, block.kv_heads, tokens)


def _store_ring(chunk: AttentionInputs, cache: DilatedCache) -> None:
    """Write the chunk's last tokens over the window's oldest."""
    if cache.layout.ring is None:
        return
    (ring, block), end = cache.layout.ring, cache.position + chunk.length
    count = min(chunk.length, block.rows)
    place = ring.place_of(torch.arange(end - count, end, device=cache.device))
    for target, new in zip(cache._rows_of(block, 0, block.rows), (chunk.key, chunk.value), strict=True):
        target[:, :, place] = new[:, :, chunk.length - count :]
