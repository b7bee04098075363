"""What torchscale's padding adds to dilated attention, as integers: for its checkpoints, which were trained with it.

torchscale cuts a segment to ``min(w, N)`` tokens, fills the last one up to w and each up to a multiple of r, all with zeros, and
lets the zeros attend and be attended to. A zero key has score 0 and value 0: a **phantom**, which adds 1 to a denominator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from longnet.geometry.pattern import Pattern
from longnet.geometry.rows import Branch


@dataclass(frozen=True)
class PhantomRun:
    """Heads ``[first_head, last_head)`` see ``count`` phantoms from positions ``start``, ``start + step``, ... to the end."""

    first_head: int
    last_head: int
    start: int
    step: int
    count: int


def padded_length(branch: Branch) -> int:
    """A segment's length up to a multiple of the rate."""
    return branch.rows(branch.segment_length, 0) * branch.dilation_rate


@lru_cache(maxsize=256)
def split_shifted(pattern: Pattern, length: int) -> tuple[Pattern | None, tuple[Branch, ...]]:
    """(the branches whose outputs stay in place, None if there are none; the others).

    Outputs of segment i land ``i * pad`` positions later where segments are padded and there is more than one.
    """
    shifted = tuple(b for b in pattern.branches if length > b.segment_length != padded_length(b))
    in_place = tuple(branch for branch in pattern.branches if branch not in shifted)
    return (replace(pattern, branches=in_place) if in_place else None), shifted


@lru_cache(maxsize=64)
def phantom_runs(pattern: Pattern, heads: int, length: int) -> tuple[PhantomRun, ...]:
    """Phantoms of the branches that are not shifted: they are all in a branch's last segment."""
    return tuple(run for branch in pattern.branches for run in _runs(pattern, branch, heads, length))


def _runs(pattern: Pattern, branch: Branch, heads: int, length: int) -> Iterator[PhantomRun]:
    rate = branch.dilation_rate
    if not length:
        return
    start = branch.segment_start(length - 1)
    slots = branch.rows(branch.longest(length), 0)
    offsets = [pattern.offset(branch, head, heads) for head in range(heads)]
    first = 0
    for head in range(1, heads + 1):
        if head < heads and offsets[head] == offsets[first]:
            continue
        offset = offsets[first]
        count = slots - branch.rows(length - start, offset)
        if count and start + offset < length:
            yield PhantomRun(first, head, start + offset, rate, count)
        first = head
