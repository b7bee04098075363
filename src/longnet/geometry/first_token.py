"""Which keys the first token of a sequence sees, as integers: its read-out is computed by itself, without a kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from longnet.geometry.pattern import Pattern


@dataclass(frozen=True)
class FirstKeys:
    """In one branch, ``heads`` select the first token, and with it the keys at 0, ``step``, ... below ``end``."""

    heads: tuple[int, ...]
    end: int
    step: int


def first_keys(pattern: Pattern, heads: int, length: int) -> Iterator[FirstKeys]:
    """Branch by branch, where there are such heads. A key that several branches yield for a head counts so often."""
    for branch in pattern.branches:
        selecting = tuple(head for head in range(heads) if pattern.selects(branch, head, heads, 0))
        if selecting:
            yield FirstKeys(selecting, min(branch.segment_stop(0), length), branch.dilation_rate)
