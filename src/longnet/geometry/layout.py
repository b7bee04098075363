"""Where a cache keeps what: blocks of rows that the heads of one offset share. Integers only.

A later token reaches, in a branch (w, r), the selected positions of its own segment: ``ceil((w - s) / r)`` rows for a head
with the offset ``s``. Heads of one offset select the same positions, so their rows form a dense rectangle, a block; all
blocks of all branches lie one behind the other in one tensor, and heads whose numbers of rows differ waste nothing.
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


@dataclass(frozen=True)
class Layout:
    """All blocks, by branch in the pattern's order, and the rows they fill together."""

    pattern: Pattern
    heads: int
    kv_heads: int
    branches: tuple[tuple[Branch, tuple[Block, ...]], ...]
    rows: int

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
def make_layout(pattern: Pattern, heads: int, kv_heads: int) -> Layout:
    """The blocks of ``pattern`` for ``heads`` query heads that read ``kv_heads`` key/value heads. Cached."""
    branches, first = [], 0
    for branch in pattern.branches:
        blocks = []
        # Key/value heads that equally many query heads read fit one rectangle.
        rectangles: dict[tuple[int, int], dict[int, list[int]]] = {}
        for (offset, kv_head), readers in pattern.readers(branch, heads, kv_heads).items():
            rectangles.setdefault((offset, len(readers)), {})[kv_head] = readers
        for (offset, share), chosen in sorted(rectangles.items()):
            numbers = [head for readers in chosen.values() for head in readers]
            rows = branch.rows(branch.segment_length, offset)
            block = Block(offset, _index(numbers), _index(list(chosen)), len(chosen), share, first, rows)
            blocks.append(block)
            first += block.size
        branches.append((branch, tuple(blocks)))
    return Layout(pattern, heads, kv_heads, tuple(branches), first)


def head_numbers(heads: Heads) -> list[int]:
    return list(range(heads.start, heads.stop, heads.step)) if isinstance(heads, slice) else heads


def _index(numbers: list[int]) -> Heads:
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if all(later - earlier == step for earlier, later in pairwise(numbers)):
        return slice(numbers[0], numbers[-1] + 1, step)
    return numbers
