"""A chunk of any length: what it adds to a stream costs what its own tokens attend to, and nothing else.

In a branch (w, r) the tokens of a chunk see two kinds of keys. Those of the chunk itself are the operation on the chunk,
cut at the segment grid; those read before belong to the segment in which the chunk starts, and every query of it sees all of
them: a rectangle without a diagonal. The parts are mixed by their softmax denominators, which makes them one softmax.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from longnet.attention import merge
from longnet.attention.backends import select_backend
from longnet.attention.backends.views import tile_view
from longnet.attention.call import AttentionInputs, AttentionSpec
from longnet.attention.streaming.cache import DilatedCache
from longnet.attention.streaming.rectangle import rectangle_attention
from longnet.geometry import Branch, Pattern, Tile, make_plan
from longnet.geometry.chunks import own_parts
from longnet.geometry.layout import Block, Heads, Layout, head_numbers
from longnet.runtime.cache import GraphSafeCache


class _Mixture:
    """The parts' joint softmax so far, in the dtype of its lse: a chunk has many parts, and each would round."""

    def __init__(self, out: Tensor, lse: Tensor) -> None:
        self.out, self.lse = out.to(lse.dtype), lse

    def add(self, heads: Heads, tokens: slice, out: Tensor, lse: Tensor) -> None:
        """Mix (out, lse) of some heads and tokens in."""
        index = (slice(None), heads, tokens)
        mixed_out, mixed_lse = self.out[index], self.lse[index]
        merge.merge_(mixed_out, mixed_lse, out, lse)
        if not isinstance(heads, slice):
            # A list of heads gave copies.
            self.out[index], self.lse[index] = mixed_out, mixed_lse


def attend_chunk(query: Tensor, key: Tensor, value: Tensor, cache: DilatedCache, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of the next T >= 1 tokens, whose keys and values are then in the cache, and counted.

    Args:
        query: (B, H, T, D).
        key, value: (B, Hk, T, D).

    Returns:
        (B, H, T, D) in the query's dtype, and the lse (B, H, T).
    """
    length = query.shape[2]
    padded = cache._padded(length)
    chunk = AttentionInputs(query, key, value, padded, None, AttentionSpec(cache.pattern, True, scale))
    both = _attend(chunk, cache)
    with cache._writing():
        _store(chunk, cache)
        cache.moved(length)
    return both


def _run(inputs: AttentionInputs, pattern: Pattern, backend: str) -> tuple[Tensor, Tensor]:
    """(out, lse) of the tokens as if they were a whole sequence with this pattern."""
    inputs = replace(inputs, spec=AttentionSpec(pattern, True, inputs.spec.scale))
    return select_backend(backend, inputs).run(inputs)


def _attend(chunk: AttentionInputs, cache: DilatedCache) -> tuple[Tensor, Tensor]:
    pattern, start, scale = cache.pattern, cache.position, chunk.spec.scale
    if pattern.window_start(start) == start:
        return _run(chunk, cache._pattern_of_chunk(), cache.backend)
    parts, unaligned = own_parts(pattern, start, chunk.length)
    # Branches that can be computed in one go are: backends visit keys that nested branches share once.
    if parts and parts[0].tokens == slice(0, chunk.length):
        mixture = _Mixture(*_run(chunk, parts[0].pattern, cache.backend))
        parts = parts[1:]
    else:
        mixture = _Mixture(*chunk.mixture_of_nothing())
    for part in parts:
        mixture.add(slice(None), part.tokens, *_run(chunk.tokens(part.tokens), part.pattern, cache.backend))
    for branch, blocks in cache.layout.branches:
        segment, stop = branch.segment_start(start), min(branch.segment_stop(start), start + chunk.length)
        if segment == start or _add_rectangle(mixture, chunk, cache, branch, blocks, stop):
            continue
        row_by_row = branch in unaligned
        for block in blocks:
            # The chunk's rows of the segment that began before it.
            rows = branch.selected(start, stop, block.offset)
            if not rows.size:
                continue
            tokens = rows.tokens(start)
            query = chunk.query[:, block.heads, tokens]
            if row_by_row:
                mixture.add(block.heads, tokens, *_own_rows(query, chunk, block, tokens, cache.backend))
            if rows.number:
                padded = _padded_rows(cache, branch, block.offset)
                cached = cache._rows_of(block, 0, rows.number)
                mixture.add(block.heads, tokens, *rectangle_attention(query, *cached, scale, padded, cache.backend))
    return mixture.out.to(chunk.query.dtype), mixture.lse


def _own_rows(
    query: Tensor, chunk: AttentionInputs, block: Block, tokens: slice, backend: str
) -> tuple[Tensor, Tensor]:
    """What a block's rows among these tokens say to each other: plain causal attention."""
    key, value = (x[:, block.kv_heads, tokens] for x in (chunk.key, chunk.value))
    padded = None if chunk.mask is None else chunk.mask[:, tokens]
    count = query.shape[2]
    if count == 1:
        return rectangle_attention(query, key, value, chunk.spec.scale, padded, backend)
    return _run(AttentionInputs(query, key, value, padded, None, chunk.spec), Pattern((Branch(count, 1),)), backend)


def _add_rectangle(
    mixture: _Mixture, chunk: AttentionInputs, cache: DilatedCache, branch: Branch, blocks: tuple[Block, ...], stop: int
) -> bool:
    """Mix in what the chunk's rows up to ``stop`` see of the rows that were read before, if one call takes all of them."""
    start = cache.position
    if not branch.is_aligned(start) or cache._most_padding > branch.segment_start(start):
        return False
    tile = _one_tile(cache, branch, blocks, stop - start)
    if tile is None:
        return False
    # Offset by offset and head by head, as the blocks lie.
    query = tile_view(chunk.query, tile)
    cached = cache._rows_of(blocks[0], 0, branch.selected(start, stop, 0).number, len(blocks))
    out, lse = rectangle_attention(query.flatten(1, 3), *cached, chunk.spec.scale, None, cache.backend)
    mixed = tile_view(mixture.out, tile), tile_view(mixture.lse, tile)
    merge.merge_(*mixed, out.view(query.shape), lse.view(query.shape[:-1]))
    return True


def _one_tile(cache: DilatedCache, branch: Branch, blocks: tuple[Block, ...], length: int) -> Tile | None:
    """The rows of ``length`` tokens from a multiple of the rate on, if they and the branch's blocks are one rectangle."""
    tiles = make_plan(cache.pattern.of(branch), cache.heads, length).branches[0].tiles
    shapes = {(block.kv_count, block.share, block.rows) for block in blocks}
    return tiles[0] if len(tiles) == len(shapes) == 1 and tiles[0].offsets == len(blocks) else None


def _padded_rows(cache: DilatedCache, branch: Branch, offset: int) -> Tensor | None:
    """Which rows that were read before are padding, of those that the offset selects in the segment: (B, rows)."""
    segment = branch.segment_start(cache.position)
    if cache._most_padding <= segment + offset:
        return None
    at = branch.selected(segment, cache.position, offset).positions
    return torch.arange(at.start, at.stop, at.step, device=cache.device) < cache.padding[:, None]


def _store(chunk: AttentionInputs, cache: DilatedCache) -> None:
    """Write the chunk's rows of the segment that goes on after it."""
    start, end = cache.position, cache.position + chunk.length
    if cache.device.type == "cuda":
        # A GPU waits for launches: all blocks together need two copies.
        _store_by_places(chunk, cache)
        return
    for branch, blocks in cache.layout.branches:
        first = max(start, branch.segment_start(end))
        for block in blocks:
            rows = branch.selected(first, end, block.offset)
            if rows.size:
                index = (slice(None), block.kv_heads, rows.tokens(start))
                stored = cache._rows_of(block, rows.number, rows.number + rows.size)
                for target, new in zip(stored, (chunk.key, chunk.value), strict=True):
                    target.copy_(new[index])


# Of chunks that were read last: the layers of a model have few layouts between them.
_PLACES = GraphSafeCache(8)


def _store_by_places(chunk: AttentionInputs, cache: DilatedCache) -> None:
    """What :func:`_store` does, in as many launches whatever the number of blocks."""
    layout, start, end, device = cache.layout, cache.position, cache.position + chunk.length, cache.device
    make = lambda: _places(layout, start, end).to(device)  # noqa: E731
    rows, heads, tokens = _PLACES.get((layout, start, end, device), device, make).unbind()
    for storage, new in ((cache.keys, chunk.key), (cache.values, chunk.value)):
        storage.index_copy_(1, rows, new[:, heads, tokens])


def _places(layout: Layout, start: int, end: int) -> Tensor:
    """What :func:`_store` writes: (3, rows) int64, a row of the storage, its key/value head and its token of the chunk each."""
    found = [torch.empty(3, 0, dtype=torch.int64)]
    for branch, blocks in layout.branches:
        first = max(start, branch.segment_start(end))
        for block in blocks:
            rows = branch.selected(first, end, block.offset)
            number = torch.arange(block.kv_count)[:, None]
            heads = torch.tensor(head_numbers(block.kv_heads))[:, None]
            count = torch.arange(max(0, rows.size))
            row, token = block.first + number * block.rows + rows.number + count, rows.first - start + count * rows.step
            found.append(torch.stack(torch.broadcast_tensors(row, heads, token)).flatten(1))
    return torch.cat(found, 1)
