"""How a window is cut over the processes that share it: for as many tokens each, or for as much work."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import accumulate, pairwise

import torch

from longnet.distributed import shard_lengths
from longnet.geometry.cost import score_pairs_by_shard
from longnet.models import LongNetConfig
from longnet.training.estimate import format_bytes, free_memory, step_memory, window_flops
from longnet.training.settings import TrainSettings

Cut = Callable[[int], tuple[int, ...]]
"""Tokens of each process's part of a window of so many, in rank order."""

# The share of a device's free memory that an estimated step may take, and how much longer equal parts have to take.
_MEMORY, _GAIN = 0.8, 0.1


def even_cut(length: int, ranks: int) -> tuple[int, ...]:
    """As many tokens for each, as far as can be."""
    # Shards that begin at multiples of the rates are fastest; a power of two is a multiple of most rates.
    return shard_lengths(length, ranks, 1 << max(0, (length // ranks).bit_length() - 3))


# Asked for in every step.
@lru_cache(maxsize=64)
def equal_work_cut(config: LongNetConfig, length: int, ranks: int) -> tuple[int, ...]:
    """As much work for each: FLOPs of :func:`longnet.training.estimate.step_flops`.

    Where a causal layer reads far, later tokens read more keys, so that later parts are shorter.
    """
    unit = 1 << max(0, (length // ranks).bit_length() - 7)
    places, whole = range(0, length, unit), _work(config, length, length)
    ends = [0]
    for rank in range(1, ranks):
        place = bisect_left(places, whole * rank, key=lambda end: ranks * _work(config, length, end))
        ends.append(min(length, place * unit))
    parts = tuple(stop - start for start, stop in pairwise([*ends, length]))
    # Of few tokens equal parts can have less to do.
    return min(parts, even_cut(length, ranks), key=lambda some: busiest(config, some))


def choose_cut(settings: TrainSettings, device: torch.device, dp: int, cp: int) -> tuple[Cut, list[str]]:
    """How windows are cut over ``cp`` processes, and lines that say so.

    For equal work where that saves time and a step with its longest part fits into the memory of ``device``; else evenly.
    """
    even = partial(even_cut, ranks=cp)
    if cp == 1 or not isinstance(settings.model, LongNetConfig):
        return even, []
    config, length = settings.model, settings.context
    parts = equal_work_cut(config, length, cp)
    gain = busiest(config, even(length)) / busiest(config, parts) - 1
    if gain < _GAIN:
        return even, []
    free, needed = free_memory(device), step_memory(settings, device, dp=dp, cp=cp, longest=max(parts)).total
    if free is not None and needed > _MEMORY * free:
        return even, [
            f"Processes share a window in equal parts. For equal work one would have {max(parts):,} tokens, and may need "
            f"{format_bytes(needed)} of the {format_bytes(free)} that {device} has; equal parts take {gain:.0%} longer"
        ]
    said = ", ".join(f"{part:,}" for part in parts)
    return partial(equal_work_cut, config, ranks=cp), [
        f"Processes share a window of {length:,} tokens in parts of {said}, for equal work: equal parts would take {gain:.0%} "
        "longer"
    ]


def busiest(config: LongNetConfig, parts: tuple[int, ...]) -> int:
    """FLOPs of the part that has most of a window."""
    work = [_work(config, sum(parts), end) for end in accumulate(parts, initial=0)]
    return max(later - earlier for earlier, later in pairwise(work))


def _work(config: LongNetConfig, length: int, stop: int) -> int:
    """FLOPs of the first ``stop`` tokens of a window."""
    of_token, of_pair = window_flops(config)
    pairs = sum(
        count * score_pairs_by_shard(layer.pattern, layer.heads, (stop, length - stop), True)[0]
        for layer, count in Counter(config.layer_attentions()).items()
    )
    return stop * of_token + pairs * of_pair
