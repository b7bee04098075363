"""How a window is cut among the processes that share it: into equal parts, or into parts of equal work."""

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
"""From the length of a window to the length of each process's part, in rank order, both in tokens."""

# The largest share of a device's free memory that a step may take by estimate. Equal parts are kept unless they take this share
# of the time longer.
_MEMORY, _GAIN = 0.8, 0.1


def even_cut(length: int, ranks: int) -> tuple[int, ...]:
    """Equal parts, but for where they may begin."""
    # Shards that begin at multiples of the rates are fastest; a power of two is a multiple of most rates.
    return shard_lengths(length, ranks, 1 << max(0, (length // ranks).bit_length() - 3))


# Asked for in every step.
@lru_cache(maxsize=64)
def equal_work_cut(config: LongNetConfig, length: int, ranks: int) -> tuple[int, ...]:
    """Parts of equal work, counted in FLOPs as in :func:`longnet.training.estimate.step_flops`.

    Where a causal layer reads far, later tokens read more keys, so later parts are shorter.
    """
    unit = 1 << max(0, (length // ranks).bit_length() - 7)
    places, whole = range(0, length, unit), _work(config, length, length)
    ends = [0]
    for rank in range(1, ranks):
        place = bisect_left(places, whole * rank, key=lambda end: ranks * _work(config, length, end))
        ends.append(min(length, place * unit))
    parts = tuple(stop - start for start, stop in pairwise([*ends, length]))
    # In a window of few tokens equal parts can be better balanced.
    return min(parts, even_cut(length, ranks), key=lambda some: busiest(config, some))


def choose_cut(settings: TrainSettings, device: torch.device, dp: int, cp: int) -> tuple[Cut, list[str]]:
    """How windows are cut among ``cp`` processes, and lines for the user, none where parts are equal.

    Parts have equal work where that saves time and a step with the longest part fits into the memory of ``device``. Otherwise
    they are equal.
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
    """The FLOPs of the part that has the most."""
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
