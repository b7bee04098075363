"""The plan: a pattern on a given number of heads and tokens, cut into strided rectangles.

A head's rows of one branch lie at equal steps, heads with neighbouring offsets start at neighbouring rows, and
segments follow each other at equal steps. So the whole selection of a branch is a handful of *tiles*, each an affine
index space (segment, offset, head, row) that any strided kernel can read without a gather. Everything ragged
(lengths that divide nothing, rates that do not divide the segment, heads that do not fill the rates) becomes another
tile, never a special case in a backend. Integers only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from longnet.geometry.pattern import LONGEST_SEGMENT, Pattern
from longnet.geometry.rows import Branch, Rows


@dataclass(frozen=True)
class Tile:
    """A rectangle of selected rows; every (segment, offset, head) of it holds ``rows`` of them, all attending to each other.

    Index (s, c, i, t) with ``s < segments``, ``c < offsets``, ``i < heads``, ``t < rows`` stands for

    - the position ``start + s * segment_step + c + t * row_step`` and
    - the head ``head + c * head_step_per_offset + i * head_step``.
    """

    start: int
    segments: int
    segment_step: int
    offsets: int
    heads: int
    rows: int
    row_step: int
    head: int
    head_step_per_offset: int
    head_step: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(segments, offsets, heads, rows)."""
        return (self.segments, self.offsets, self.heads, self.rows)

    def strides(self, head_stride: int, token_stride: int) -> tuple[int, int, int, int]:
        """Memory steps of (segment, offset, head, row) in a tensor with these strides, in elements."""
        return (
            self.segment_step * token_stride,
            self.head_step_per_offset * head_stride + token_stride,
            self.head_step * head_stride,
            self.row_step * token_stride,
        )

    def origin(self, head_stride: int, token_stride: int) -> int:
        """Memory step from element (head 0, token 0) to the tile's first row, in elements."""
        return self.head * head_stride + self.start * token_stride

    def positions(self) -> Iterator[tuple[int, int, list[int]]]:
        """Every (head, segment start, selected positions). For tests, plots and small cases."""
        for segment in range(self.segments):
            for c in range(self.offsets):
                first = self.start + segment * self.segment_step + c
                for i in range(self.heads):
                    head = self.head + c * self.head_step_per_offset + i * self.head_step
                    yield head, segment, [first + t * self.row_step for t in range(self.rows)]


@dataclass(frozen=True)
class BranchPlan:
    """One branch's tiles. They are disjoint; ``covers_all`` when they hold every (head, position)."""

    branch: Branch
    tiles: tuple[Tile, ...]

    @property
    def covers_all(self) -> bool:
        return self.branch.dilation_rate == 1


@dataclass(frozen=True)
class Plan:
    """A pattern on heads ``[first_head, last_head)`` of ``heads`` and on ``length`` tokens.

    ``branches`` come with the covering ones (rate 1) first, so that the first may assign where later ones must merge;
    the order changes nothing else.
    Tile heads count from ``first_head``.
    """

    pattern: Pattern
    heads: int
    length: int
    first_head: int
    last_head: int
    branches: tuple[BranchPlan, ...]


@lru_cache(maxsize=1024)
def make_plan(
    pattern: Pattern,
    heads: int,
    length: int,
    first_head: int = 0,
    last_head: int | None = None,
    segment_offset: int = 0,
) -> Plan:
    """The plan of ``pattern`` for ``length`` tokens, restricted to heads ``[first_head, last_head)``. Cached.

    Offsets are those of the absolute head numbers, so a block of heads computes exactly its part of the whole. On the grid
    position ``p`` counts as ``p + segment_offset``. A window is no part of a plan.
    """
    last = heads if last_head is None else last_head
    branches = sorted(
        (
            BranchPlan(
                branch, tuple(_tiles(pattern, branch, heads, length, first_head, last, branch.origin(segment_offset)))
            )
            for branch in pattern.branches
        ),
        key=lambda planned: not planned.covers_all,
    )
    return Plan(pattern, heads, length, first_head, last, tuple(branches))


def _tiles(
    pattern: Pattern, branch: Branch, heads: int, length: int, first: int, last: int, origin: int
) -> Iterator[Tile]:
    for start, segments, span in branch.spans(length, origin):
        for head, offset, offsets, per_offset, per_head, group in _head_rectangles(pattern, branch, heads, first, last):
            of_offsets = [branch.selected(start, start + span, c) for c in range(offset, offset + offsets)]
            for c, count in _row_classes(of_offsets):
                yield Tile(
                    start=of_offsets[c].first - origin,
                    segments=segments,
                    segment_step=min(branch.segment_length, LONGEST_SEGMENT),
                    offsets=count,
                    heads=group,
                    rows=of_offsets[c].size,
                    row_step=branch.dilation_rate,
                    head=head + c * per_offset - first,
                    head_step_per_offset=per_offset,
                    head_step=per_head,
                )


def _row_classes(of_offsets: list[Rows]) -> Iterator[tuple[int, int]]:
    """The rows of neighbouring offsets where each begin one token after the last and are as many: (index, how many)."""
    start = 0
    for i, rows in enumerate(of_offsets, 1):
        following = of_offsets[i] if i < len(of_offsets) else None
        if following is None or (following.first, following.size) != (rows.first + 1, rows.size):
            if rows.size:
                yield start, i - start
            start = i


def _head_rectangles(
    pattern: Pattern, branch: Branch, heads: int, first: int, last: int
) -> Iterator[tuple[int, int, int, int, int, int]]:
    """Heads [first, last) as rectangles.

    Yields (first head, first offset, offsets, head step per offset, head step, heads per offset).
    """
    members: dict[int, list[int]] = {}
    for head in range(first, last):
        members.setdefault(pattern.offset(branch, head, heads), []).append(head)
    # Heads of one offset at equal steps are a row; a row of the next offset may continue a rectangle.
    rectangles: list[tuple[int, int, int, int, int, int]] = []
    for offset, row in sorted(members.items()):
        grown = []
        for head, step, count in _progressions(row):
            for rectangle in rectangles:
                start, low, offsets, per_offset, per_head, group = rectangle
                moved, rest = divmod(head - start, offsets)
                steady = rest == 0 and moved > 0 and (offsets == 1 or moved == per_offset)
                if steady and (low + offsets, per_head, group) == (offset, step, count):
                    rectangles.remove(rectangle)
                    grown.append((start, low, offsets + 1, moved, per_head, group))
                    break
            else:
                grown.append((head, offset, 1, 1, step, count))
        yield from rectangles
        rectangles = grown
    yield from rectangles


def _progressions(heads: list[int]) -> Iterator[tuple[int, int, int]]:
    """Rising heads cut into arithmetic progressions, greedily: (first, step, count)."""
    start = 0
    while start < len(heads):
        step = heads[start + 1] - heads[start] if start + 1 < len(heads) else 1
        end = start + 1
        while end < len(heads) and heads[end] - heads[end - 1] == step:
            end += 1
        yield heads[start], step, end - start
        start = end
