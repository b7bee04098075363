"""Nests: branches whose selections lie inside each other, so that keys they share are attended to once.

When every segment length divides the next, every rate divides the next and every head's offsets agree, a row that a
branch selects is selected by all finer branches of the nest too, and so are its keys inside the finer segment. A key
that ``m`` branches share counts ``m`` times in the joint softmax (the multiset union), which is one term with the
weight ``m``. So branch ``i`` has to visit only the keys *outside* the segment of branch ``i - 1``: for the paper's
geometric series half of them, and nothing is mixed afterwards, because one online softmax runs through all branches.

A row's **level** is how many branches select it. Rows of one level and one residue lie at equal steps (a class), and
every key they see in branch ``i`` has the weight ``min(level of the row, level of the key) - i``.

Any pattern is a list of nests; a branch that fits no other is a nest of its own, whose rows all have level 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from longnet.geometry.pattern import Pattern
from longnet.geometry.rows import Branch, Branches
from longnet.hashed import hash_once


@dataclass(frozen=True)
class RowClass:
    """The rows of a segment of the finest branch that ``level`` branches select, as arithmetic progressions.

    Of a head with offset ``s`` in the ``step``, they start at ``(s + c * inner) mod step``, ``1 <= c <= residues``, where
    ``inner`` is the rate of branch ``level - 1``.
    """

    level: int
    inner: int
    step: int
    residues: int

    def first_rows(self, offset: int) -> list[int]:
        """Where the rows of a head start, by residue; ``offset`` is that in the ``step``."""
        return [(offset + c * self.inner) % self.step for c in range(1, self.residues + 1)]


@hash_once
@dataclass(frozen=True)
class Nest(Branches):
    """Nested branches, finest first."""

    branches: tuple[Branch, ...]

    @property
    def covers_all(self) -> bool:
        """Whether every (head, position) is in it."""
        return self.branches[0].dilation_rate == 1

    def segments(self, length: int, segment_offset: int | None) -> int:
        """How many segments of the finest branch hold some of ``length`` tokens, at most; None is any offset of the grid."""
        finest = self.branches[0]
        before = finest.segment_length - 1 if segment_offset is None else finest.origin(segment_offset)
        return -(-(before + length) // finest.segment_length)

    @property
    def classes(self) -> tuple[RowClass, ...]:
        """Every row of the finest branch, by level. Empty classes (two branches of one rate) are left out."""
        classes = []
        for level, (branch, coarser) in enumerate(zip(self.branches, (*self.branches[1:], None), strict=True), 1):
            inner = branch.dilation_rate
            step = inner if coarser is None else coarser.dilation_rate
            residues = 1 if coarser is None else step // inner - 1
            if residues:
                classes.append(RowClass(level, inner, step, residues))
        return tuple(classes)


@lru_cache(maxsize=1024)
def make_nests(pattern: Pattern, heads: int, unit: int, least_rows: int) -> tuple[Nest, ...]:
    """The pattern's branches as nests; one that covers everything comes first, so that later ones can be mixed in.

    Args:
        unit: rates of a nest of several branches divide it; blocks of that many keys then all have the same weights.
        least_rows: a coarser branch joins only when it selects at least so many rows of the finest segment: below
            that a class would fill too little of a block of rows.
    """
    nests: list[list[Branch]] = []
    for branch in sorted(pattern.branches, key=lambda b: (b.segment_length, b.dilation_rate)):
        for nest in nests:
            full = nest[0].segment_length // branch.dilation_rate >= least_rows
            if full and unit % branch.dilation_rate == 0 and _fits(pattern, nest, branch, heads):
                nest.append(branch)
                break
        else:
            nests.append([branch])
    return tuple(sorted((Nest(tuple(nest)) for nest in nests), key=lambda nest: not nest.covers_all))


def _fits(pattern: Pattern, nest: Sequence[Branch], branch: Branch, heads: int) -> bool:
    finest, last = nest[0], nest[-1]
    return (
        branch.segment_length % last.segment_length == 0
        and branch.dilation_rate % last.dilation_rate == 0
        and finest.segment_length % branch.dilation_rate == 0
        and all(
            pattern.offset(branch, head, heads) % last.dilation_rate == pattern.offset(last, head, heads)
            for head in range(heads)
        )
    )
