"""Parts of a pattern whose queries read a range of chosen keys: windows, branches with all queries, blocks.

A head chooses some keys, in rising order, and each of its queries reads those from one number to another. Both rise with the
query, so a few queries in a row read few keys more than one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from longnet.geometry import Branch, Pattern

# Tokens.
_LONGEST_CACHED = 1 << 14

# Rising positions, in a tensor on the CPU, or at equal steps.
Positions = Tensor | range


def tensor_of(positions: Positions) -> Tensor:
    """The positions as int64 on the CPU."""
    if isinstance(positions, Tensor):
        return positions
    return torch.arange(positions.start, positions.stop, positions.step, device="cpu")


@dataclass(frozen=True)
class KeyRanges:
    """What some heads read. On the CPU.

    Args:
        heads: (h,) query heads.
        queries: (a,) their positions, rising.
        keys: (b,) positions, rising.
        low, high: (a,) query i reads the keys ``low[i] <= k < high[i]``.
    """

    heads: Tensor
    queries: Tensor
    keys: Tensor
    low: Tensor
    high: Tensor

    def cut(self, most: int) -> Iterator[tuple[int, int, int, int]]:
        """Queries in a row, and all keys that one of them reads: (first query, query after the last, first key, key after it).

        As many as add little to the keys that one of them reads alone, and at most about ``most`` pairs.
        """
        count = len(self.queries)
        widest = int((self.high - self.low).max()) if count else 0
        height = max(1, min(max(64, widest // 4), most // max(1, widest)))
        for first in range(0, count, height):
            last = min(count, first + height)
            yield first, last, int(self.low[first]), int(self.high[last - 1])


def index_of(heads: Positions, positions: Positions, device: torch.device) -> tuple[slice, Any, Any]:
    """The index of some heads and positions in a (B, H, N, ...) tensor: of a view where both lie at equal steps."""
    rows, columns = (x.to(device) if isinstance(x, Tensor) else x for x in map(_as_slice, (heads, positions)))
    if isinstance(rows, Tensor) and isinstance(columns, Tensor):
        rows = rows[:, None]
    return slice(None), rows, columns


def _as_slice(numbers: Positions) -> slice | Tensor:
    if isinstance(numbers, range):
        return slice(numbers.start, numbers.stop, numbers.step) if len(numbers) else slice(0, 0)
    if len(numbers) < 2:
        return slice(int(numbers[0]), int(numbers[0]) + 1) if len(numbers) else slice(0, 0)
    step = numbers[1:] - numbers[:-1]
    if not bool((step == step[0]).all()):
        return numbers
    return slice(int(numbers[0]), int(numbers[-1]) + 1, int(step[0]))


def key_ranges(
    pattern: Pattern, heads: int, length: int, is_causal: bool, segment_offset: int
) -> tuple[KeyRanges, ...]:
    """All parts of a pattern, apart from the branches that :func:`longnet.geometry.make_plan` can express.

    Those of short sequences are cached; long ones hold several tensors of N numbers for each head offset.
    """
    make = _cached_ranges if length <= _LONGEST_CACHED else _make_ranges
    return make(pattern, heads, length, is_causal, segment_offset)


def ranges_between(
    pattern: Pattern,
    branch: Branch | None,
    heads: Tensor,
    queries: Tensor,
    keys: Tensor,
    is_causal: bool,
    origin: int,
) -> KeyRanges:
    """Which of some chosen ``keys`` of a branch, or of the window for None, some of its ``queries`` read.

    Queries that read none are left out.
    """
    first, stop = pattern.read_span(branch, queries, is_causal, origin)
    low, high = torch.searchsorted(keys, first), torch.searchsorted(keys, stop)
    read = low < high
    return KeyRanges(heads, queries[read], keys, low[read], high[read])


def _make_ranges(
    pattern: Pattern, heads: int, length: int, is_causal: bool, segment_offset: int
) -> tuple[KeyRanges, ...]:
    with torch.inference_mode(False):
        position, parts = torch.arange(length, device="cpu"), []
        if pattern.window is not None:
            low, high = pattern.read_span(None, position, is_causal, 0)
            everyone = torch.arange(heads, device="cpu")
            parts.append(KeyRanges(everyone, position, position, low.clamp(min=0), high.clamp(max=length)))
        if not pattern.rows_at_equal_steps:
            for branch in pattern.branches:
                parts.extend(_of_branch(pattern, branch, heads, position, is_causal, branch.origin(segment_offset)))
    return tuple(parts)


_cached_ranges = lru_cache(maxsize=16)(_make_ranges)


def _of_branch(
    pattern: Pattern, branch: Branch, heads: int, position: Tensor, is_causal: bool, origin: int
) -> Iterator[KeyRanges]:
    first, stop = pattern.read_span(branch, position, is_causal, origin)
    first, stop = first.clamp(min=0), stop.clamp(max=len(position))
    offsets = [pattern.offset(branch, head, heads) for head in range(heads)]
    for offset in sorted(set(offsets)):
        selected = branch.selects(position + origin, offset)
        # How many keys there are before each position, and before the end.
        before = torch.cat((torch.zeros(1, dtype=torch.int64, device="cpu"), selected.cumsum(0)))
        keys = position[selected]
        queries = keys if pattern.dilated_queries else position
        those = torch.tensor([head for head in range(heads) if offsets[head] == offset], device="cpu")
        yield KeyRanges(those, queries, keys, before[first[queries]], before[stop[queries]])
