"""A chunk of any length: what it adds to a stream costs what its own tokens attend to, and nothing else.

In a branch (w, r) the tokens of a chunk see two kinds of keys. Those of the chunk itself are the operation on the chunk,
cut at the segment grid; those read before belong to the segment in which the chunk starts, and every query of it sees all of
them: a rectangle without a diagonal. The parts are mixed by their softmax denominators, which makes them one softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longnet import mixing
from longnet.backends import Spec, select_backend
from longnet.backends.operators import lse_dtype
from longnet.geometry import Branch, Pattern
from longnet.streaming.cache import DilatedCache
from longnet.streaming.layout import Heads
from longnet.streaming.rectangle import rectangle_attention


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

    def attend(self, *branches: Branch, head_offsets: str = "interleaved") -> tuple[Tensor, Tensor]:
        """The causal operation on the chunk as if it were a whole sequence: (out, lse)."""
        pattern = Pattern(branches, head_offsets)  # type: ignore[arg-type]
        backend = select_backend("auto", self.query.device.type, self.query.dtype, self.query.shape[-1], False)
        spec = Spec(pattern, True, self.scale)
        return backend.run(self.query, self.key, self.value, self.padded, None, spec)


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
        mixing.merge_(mixed_out, mixed_lse, out, lse)
        if not isinstance(heads, slice):
            # A list of heads gave copies.
            self.out[index], self.lse[index] = mixed_out, mixed_lse


def attend_chunk(query: Tensor, key: Tensor, value: Tensor, cache: DilatedCache, scale: float) -> Tensor:
    """Attention of the next T >= 1 tokens, whose keys and values are then in the cache; they are not counted yet.

    Args:
        query: (B, H, T, D). key, value: (B, Hk, T, D).

    Returns:
        (B, H, T, D) in the query's dtype.
    """
    start, length = cache.position, query.shape[2]
    padded = None
    if cache._most_padding > start:
        padded = torch.arange(start, start + length, device=query.device) < cache.padding[:, None]
    chunk = _Chunk(query, key, value, padded, start, scale)
    out = _attend(chunk, cache)
    _keep(chunk, cache)
    return out


def _attend(chunk: _Chunk, cache: DilatedCache) -> Tensor:
    pattern, every = cache.pattern, slice(None)
    # Branches that can be computed in one go are: backends visit keys that nested branches share once.
    together = tuple(branch for branch in pattern.branches if _on_the_grid(branch, chunk))
    if together:
        out, lse = chunk.attend(*together, head_offsets=pattern.head_offsets)
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
        if branch not in together and continued < chunk.length:
            crossing.setdefault(continued, []).append(branch)
        for block in blocks:
            row = branch.rows(before, block.offset)
            tokens = slice(block.offset + row * branch.dilation_rate - before, continued, branch.dilation_rate)
            if tokens.start >= continued:
                continue
            rows = chunk.rows(block.heads, block.kv_heads, tokens)
            if branch not in together:
                mixture.add(block.heads, tokens, *_among_themselves(rows))
            if row:
                first = chunk.start - before + block.offset
                hidden = _padded_rows(cache, first, branch.dilation_rate, row)
                cached = cache._rows_of(block, 0, row)
                mixture.add(block.heads, tokens, *rectangle_attention(rows.query, *cached, chunk.scale, hidden))
    for first, branches in crossing.items():
        tokens = slice(first, None)
        rest = chunk.rows(every, every, tokens)
        mixture.add(every, tokens, *rest.attend(*branches, head_offsets=pattern.head_offsets))
    return mixture.out.to(chunk.query.dtype)


def _padded_rows(cache: DilatedCache, first: int, step: int, count: int) -> Tensor | None:
    """Which of ``count`` rows, that stand at ``first`` and every ``step`` tokens after it, are padding: (B, count)."""
    if cache._most_padding <= first:
        return None
    return torch.arange(first, first + count * step, step, device=cache.device) < cache.padding[:, None]


def _on_the_grid(branch: Branch, chunk: _Chunk) -> bool:
    """Whether the chunk's own keys are selected as those of a sequence that begins with the chunk."""
    before = chunk.start % branch.segment_length
    return before == 0 or (before % branch.dilation_rate == 0 and before + chunk.length <= branch.segment_length)


def _among_themselves(rows: _Chunk) -> tuple[Tensor, Tensor]:
    """Plain causal attention of rows that all select each other."""
    if rows.length == 1:
        return rectangle_attention(rows.query, rows.key, rows.value, rows.scale, rows.padded)
    return rows.attend(Branch(rows.length, 1))


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
