"""A chunk of any length: what it adds to a stream costs what its own tokens attend to, and nothing else.

In a branch (w, r) the tokens of a chunk see two kinds of keys. Those of the chunk itself are the operation on the chunk,
cut at the segment grid; those read before belong to the segment in which the chunk starts, and every query of it sees all of
them: a rectangle without a diagonal. The parts are mixed by their softmax denominators, which makes them one softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longnet.attention import merge
from longnet.attention.backends import select_backend
from longnet.attention.backends.views import tile_view
from longnet.attention.call import AttentionInputs, AttentionSpec, lse_dtype
from longnet.attention.streaming.cache import DilatedCache
from longnet.attention.streaming.rectangle import rectangle_attention
from longnet.geometry import Branch, Pattern, Tile, make_plan
from longnet.geometry.layout import Block, Heads


@dataclass(frozen=True)
class _Chunk:
    """The next T tokens: tensors (B, H or Hk, T, D), which of them are padding, (B, T) or None, and where they stand."""

    query: Tensor
    key: Tensor
    value: Tensor
    padded: Tensor | None
    start: int
    scale: float

    @property
    def length(self) -> int:
        return self.query.shape[2]

    def rows(self, heads: Heads, kv_heads: Heads, tokens: slice) -> _Chunk:
        """Some of the heads and tokens; ``start`` loses its meaning."""
        padded = None if self.padded is None else self.padded[:, tokens]
        q, k, v = self.query[:, heads, tokens], self.key[:, kv_heads, tokens], self.value[:, kv_heads, tokens]
        return _Chunk(q, k, v, padded, self.start, self.scale)

    def attend(self, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """The causal operation on the chunk as if it were a whole sequence: (out, lse)."""
        spec = AttentionSpec(pattern, True, self.scale)
        inputs = AttentionInputs(self.query, self.key, self.value, self.padded, None, spec)
        return select_backend("auto", inputs).run(inputs)


class _Mixture:
    """The parts' joint softmax so far, in the dtype of its lse: a chunk has many parts, and each would round."""

    def __init__(self, out: Tensor, lse: Tensor) -> None:
        self.out, self.lse = out.to(lse.dtype), lse

    @classmethod
    def of_nothing(cls, query: Tensor) -> _Mixture:
        kind = lse_dtype(query.dtype)
        return cls(torch.zeros_like(query, dtype=kind), query.new_full(query.shape[:-1], -torch.inf, dtype=kind))

    def add(self, heads: Heads, tokens: slice, out: Tensor, lse: Tensor) -> None:
        """Mix (out, lse) of some heads and tokens in."""
        index = (slice(None), heads, tokens)
        mixed_out, mixed_lse = self.out[index], self.lse[index]
        merge.merge_(mixed_out, mixed_lse, out, lse)
        if not isinstance(heads, slice):
            # A list of heads gave copies.
            self.out[index], self.lse[index] = mixed_out, mixed_lse


def attend_chunk(query: Tensor, key: Tensor, value: Tensor, cache: DilatedCache, scale: float) -> Tensor:
    """Attention of the next T >= 1 tokens, whose keys and values are then in the cache, and counted.

    Args:
        query: (B, H, T, D).
        key, value: (B, Hk, T, D).

    Returns:
        (B, H, T, D) in the query's dtype.
    """
    start, length = cache.position, query.shape[2]
    padded = None
    if cache._most_padding > start:
        padded = torch.arange(start, start + length, device=query.device) < cache.padding[:, None]
    chunk = _Chunk(query, key, value, padded, start, scale)
    out = _attend(chunk, cache)
    with cache._writing():
        _keep(chunk, cache)
        cache.moved(length)
    return out


def _attend(chunk: _Chunk, cache: DilatedCache) -> Tensor:
    pattern, every = cache.pattern, slice(None)
    # Branches that can be computed in one go are: backends visit keys that nested branches share once.
    together = tuple(branch for branch in pattern.branches if _on_the_grid(branch, chunk))
    if together:
        out, lse = chunk.attend(pattern.of(*together))
        if all(chunk.start % branch.segment_length == 0 for branch in pattern.branches):
            return out
        mixture = _Mixture(out, lse)
    else:
        mixture = _Mixture.of_nothing(chunk.query)
    crossing: dict[int, list[Branch]] = {}
    for branch, blocks in cache.layout.branches:
        before = chunk.start % branch.segment_length
        if before == 0:
            continue
        # The first tokens, as many as this, go on with the segment that began before the chunk.
        continued = min(chunk.length, branch.segment_length - before)
        if branch not in together:
            if continued < chunk.length:
                crossing.setdefault(continued, []).append(branch)
            if before % branch.dilation_rate == 0:
                tokens = slice(0, continued)
                part = chunk.rows(every, every, tokens).attend(pattern.of(branch))
                mixture.add(every, tokens, *part)
            else:
                _add_own_rows(mixture, chunk, branch, blocks, before, continued)
        _add_cached_rows(mixture, chunk, cache, branch, blocks, before, continued)
    for first, branches in crossing.items():
        tokens = slice(first, None)
        rest = chunk.rows(every, every, tokens)
        mixture.add(every, tokens, *rest.attend(pattern.of(*branches)))
    return mixture.out.to(chunk.query.dtype)


def _rows_in_chunk(
    branch: Branch, blocks: tuple[Block, ...], before: int, continued: int
) -> Iterator[tuple[Block, int, slice]]:
    """Blocks that have rows among the tokens that go on with a segment: (block, rows before the chunk, those tokens)."""
    for block in blocks:
        row = branch.rows(before, block.offset)
        tokens = slice(block.offset + row * branch.dilation_rate - before, continued, branch.dilation_rate)
        if tokens.start < continued:
            yield block, row, tokens


def _add_own_rows(
    mixture: _Mixture, chunk: _Chunk, branch: Branch, blocks: tuple[Block, ...], before: int, continued: int
) -> None:
    """What the chunk's rows of a segment that began before it say to each other: plain causal attention in a block."""
    for block, _, tokens in _rows_in_chunk(branch, blocks, before, continued):
        rows = chunk.rows(block.heads, block.kv_heads, tokens)
        if rows.length == 1:
            part = rectangle_attention(rows.query, rows.key, rows.value, rows.scale, rows.padded)
        else:
            part = rows.attend(Pattern((Branch(rows.length, 1),)))
        mixture.add(block.heads, tokens, *part)


def _add_cached_rows(
    mixture: _Mixture,
    chunk: _Chunk,
    cache: DilatedCache,
    branch: Branch,
    blocks: tuple[Block, ...],
    before: int,
    continued: int,
) -> None:
    """What the chunk's rows of a segment see of the rows that were read before."""
    segment, rate = chunk.start - before, branch.dilation_rate
    if before % rate == 0 and cache._most_padding <= segment:
        tile = _one_tile(cache, branch, blocks, continued)
        if tile is not None:
            # Offset by offset and head by head, as the blocks lie: one call for all of them.
            query = tile_view(chunk.query, tile)
            whole = replace(blocks[0], kv_count=len(blocks) * blocks[0].kv_count)
            cached = cache._rows_of(whole, 0, before // rate)
            out, lse = rectangle_attention(query.flatten(1, 3), *cached, chunk.scale, None)
            mixed = tile_view(mixture.out, tile), tile_view(mixture.lse, tile)
            merge.merge_(*mixed, out.view(query.shape), lse.view(query.shape[:-1]))
            return
    for block, row, tokens in _rows_in_chunk(branch, blocks, before, continued):
        if row:
            hidden = _padded_rows(cache, segment + block.offset, rate, row)
            query = chunk.query[:, block.heads, tokens]
            cached = cache._rows_of(block, 0, row)
            mixture.add(block.heads, tokens, *rectangle_attention(query, *cached, chunk.scale, hidden))


def _one_tile(cache: DilatedCache, branch: Branch, blocks: tuple[Block, ...], length: int) -> Tile | None:
    """The rows of ``length`` tokens from a multiple of the rate on, if they and the branch's blocks are one rectangle."""
    tiles = make_plan(cache.pattern.of(branch), cache.heads, length).branches[0].tiles
    shapes = {(block.kv_count, block.share, block.rows) for block in blocks}
    return tiles[0] if len(tiles) == len(shapes) == 1 and tiles[0].offsets == len(blocks) else None


def _padded_rows(cache: DilatedCache, first: int, step: int, count: int) -> Tensor | None:
    """Which of ``count`` rows, that stand at ``first`` and every ``step`` tokens after it, are padding: (B, count)."""
    if cache._most_padding <= first:
        return None
    return torch.arange(first, first + count * step, step, device=cache.device) < cache.padding[:, None]


def _on_the_grid(branch: Branch, chunk: _Chunk) -> bool:
    """Whether the chunk's own keys are selected as those of a sequence that begins with the chunk."""
    before = chunk.start % branch.segment_length
    return before == 0 or (before % branch.dilation_rate == 0 and before + chunk.length <= branch.segment_length)


def _keep(chunk: _Chunk, cache: DilatedCache) -> None:
    """Write the chunk's rows of the segment that goes on after it."""
    end = chunk.start + chunk.length
    for branch, blocks in cache.layout.branches:
        inside = end % branch.segment_length
        segment = end - inside
        for block in blocks:
            first = branch.rows(max(0, chunk.start - segment), block.offset)
            last = branch.rows(inside, block.offset)
            if first >= last:
                continue
            token = segment + block.offset + first * branch.dilation_rate - chunk.start
            index = (slice(None), block.kv_heads, slice(token, None, branch.dilation_rate))
            for kept, new in zip(cache._rows_of(block, first, last), (chunk.key, chunk.value), strict=True):
                kept.copy_(new[index])
