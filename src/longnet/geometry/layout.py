"""Where a cache keeps what: blocks of rows that the heads of one offset share. Integers only.

A later token reaches, in a branch (w, r), the selected positions of its own segment: ``ceil((w - s) / r)`` rows for a head
with the offset ``s``. Heads of one offset select the same positions, so their rows form a dense rectangle, a block; all
blocks of all branches lie one behind the other in one tensor, and heads whose numbers of rows differ waste nothing.

A segment without end has as many rows as are selected of the tokens that there is room for. A window is a ring of as many rows
as it has tokens, of each key/value head: position ``p`` lies at ``p mod W``, its place in a segment of a branch (W, 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from longnet.geometry.pattern import Pattern
from longnet.geometry.rows import Branch

# Heads, as an index of a tensor's head axis: a slice where they lie at equal steps (a view), else a list (a copy).
Heads = slice | list[int]


@dataclass(frozen=True)
class Block:
    """``kv_count`` x ``rows`` rows, from row ``first`` of the storage on: what one offset of one branch keeps.

    ``share`` query heads read each key/value head. ``heads`` are in the order of the key/value heads they read.
    With grouped-query attention heads of one key/value head that have the same offset share their rows.
    """

    offset: int
    heads: Heads
    kv_heads: Heads
    kv_count: int
    share: int
    first: int
    rows: int

    @property
    def size(self) -> int:
        return self.kv_count * self.rows


@dataclass(frozen=True, eq=False)
class Layout:
    """All blocks, by branch in the pattern's order, the ring of the window, and the rows they fill together.

    It equals itself alone: :func:`make_layout` gives one layout for one pattern.
    """

    pattern: Pattern
    heads: int
    kv_heads: int
    branches: tuple[tuple[Branch, tuple[Block, ...]], ...]
    rows: int
    ring: tuple[Branch, Block] | None = None

    @property
    def bands(self) -> tuple[tuple[Branch, tuple[Block, ...], bool], ...]:
        """(branch, its blocks, whether it is the ring), as they lie in the storage."""
        ring = () if self.ring is None else ((self.ring[0], (self.ring[1],), True),)
        return *((branch, blocks, False) for branch, blocks in self.branches), *ring

    @property
    def blocks(self) -> tuple[Block, ...]:
        """As they lie in the storage."""
        return tuple(block for _, blocks, _ in self.bands for block in blocks)

    def kept_rows(self, position: int, segment_offset: int) -> list[tuple[int, int]]:
        """For each block the rows, from the first to before the last, that hold what was read before ``position`` in reach."""
        return [
            (0, min(position, block.rows))
            if is_ring
            else branch.kept_rows(position, block.offset, branch.origin(segment_offset))
            for branch, blocks, is_ring in self.bands
            for block in blocks
        ]

    def first_rows(self) -> list[list[int]]:
        """The storage row where each query head's rows begin, by branch and head."""
        first_rows = []
        for _, blocks in self.branches:
            first = [0] * self.heads
            for block in blocks:
                for number, head in enumerate(head_numbers(block.heads)):
                    first[head] = block.first + number // block.share * block.rows
            first_rows.append(first)
        return first_rows


@lru_cache(maxsize=256)
def make_layout(pattern: Pattern, heads: int, kv_heads: int, tokens: int = 0) -> Layout:
    """The blocks of ``pattern`` for ``heads`` query heads that read ``kv_heads`` key/value heads. Cached.

    Args:
        tokens: how many there is room for in a segment without end.
    """
    branches, first = [], 0
    for branch in pattern.branches:
        blocks = []
        # Key/value heads that equally many query heads read fit one rectangle.
        rectangles: dict[tuple[int, int], dict[int, list[int]]] = {}
        for (offset, kv_head), readers in pattern.readers(branch, heads, kv_heads).items():
            rectangles.setdefault((offset, len(readers)), {})[kv_head] = readers
        for (offset, share), chosen in sorted(rectangles.items()):
            numbers = [head for readers in chosen.values() for head in readers]
            if rows := branch.kept(offset, tokens):
                block = Block(offset, _index(numbers), _index(list(chosen)), len(chosen), share, first, rows)
                blocks.append(block)
                first += block.size
        branches.append((branch, tuple(blocks)))
    ring = None
    if (width := pattern.window) is not None:
        block = Block(0, slice(0, heads, 1), slice(0, kv_heads, 1), kv_heads, heads // kv_heads, first, width)
        ring, first = (Branch(width, 1), block), first + block.size
    return Layout(pattern, heads, kv_heads, tuple(branches), first, ring)


def head_numbers(heads: Heads) -> list[int]:
    return list(range(heads.start, heads.stop, heads.step)) if isinstance(heads, slice) else heads


def _index(numbers: list[int]) -> Heads:
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if all(later - earlier == step for earlier, later in pairwise(numbers)):
        return slice(numbers[0], numbers[-1] + 1, step)
    return numbers
