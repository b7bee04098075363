"""Held-out bits per byte, by position in the context: how much longer context helps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from longnet.models.generation import evaluating
from longnet.training.data import Stream, cut_windows
from longnet.training.device import autocast
from longnet.training.models import Model
from longnet.training.ranks import Ranks

NORMAL_95 = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Estimate:
    """A mean over windows with its 95 % interval; without an interval (``None``) for a single window."""

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def over_windows(cls, values: np.ndarray) -> Estimate:
        """From one value a window (W,). Windows count as independent; positions inside a window do not."""
        mean = float(values.mean())
        if values.size < 2:
            return cls(mean, None, None)
        half = NORMAL_95 * float(values.std(ddof=1)) / math.sqrt(values.size)
        return cls(mean, mean - half, mean + half)


@dataclass(frozen=True)
class PositionBin:
    """Mean bits per byte of the targets that have ``first`` to ``last`` bytes of context before them."""

    first: int
    last: int
    bits_per_byte: Estimate


@dataclass(frozen=True)
class CutContext:
    """The same held-out bytes scored twice: with their context cut, and in the second half of whole windows.

    Attributes:
        first, last: how many bytes of context they have when it is cut.
        full_first, full_last: the fewest and the most in whole windows.
        cut, full: bits per byte with the cut and with the whole context.
        gain: bits per byte that the whole context saves, paired by window; positive when it helps.
    """

    first: int
    last: int
    full_first: int
    full_last: int
    cut: float
    full: float
    gain: Estimate


def window_starts(size: int, context: int, limit: int | None = None) -> np.ndarray:
    """Starts of windows that score every byte of a stream at most once: (W,) int64, evenly spaced.

    Args:
        size: bytes in the stream.
        context: bytes per window, N.
        limit: most windows; ``None`` for all that fit.

    Raises:
        ValueError: no window and its last target fit.
    """
    fits = (size - 1) // context
    if fits < 1:
        raise ValueError(f"context={context} needs {context + 1} held-out bytes: there are {size}")
    count = fits if limit is None else min(limit, fits)
    chosen = np.arange(count) if count == fits else np.linspace(0, fits - 1, count).round().astype(np.int64)
    return chosen.astype(np.int64) * context


def score_windows(
    model: Model,
    stream: Stream,
    context: int,
    starts: np.ndarray,
    *,
    batch: int = 1,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    on_progress: Callable[[float], None] | None = None,
    ranks: Ranks | None = None,
) -> np.ndarray:
    """Bits of every target byte: (W, N) float32; column ``p`` is predicted from ``p + 1`` bytes of context.

    Args:
        model: its mode (training or evaluation) is restored.
        stream: (bytes,) uint8.
        context: N.
        starts: (W,) from ``window_starts``.
        batch: windows per forward pass.
        device, dtype: of the forward pass (autocast below float32).
        on_progress: called with the share done after every batch.
        ranks: the processes that share the model; each of them calls and gets the same result.
    """
    rows, ranks = [], ranks or Ranks()
    # Sharded weights must not become inference tensors.
    without_grad = torch.no_grad if ranks.describe() else torch.inference_mode
    with evaluating(model), without_grad(), autocast(device, dtype):
        for first in range(0, starts.size, batch):
            tokens, targets = cut_windows(stream, context, starts[first : first + batch])
            own, own_targets = (ranks.own_shard(x).to(device) for x in (tokens, targets))
            nats = ranks.whole_windows(model.loss(own, own_targets, reduction="none"))
            rows.append(nats.float().cpu().numpy() / math.log(2))
            if on_progress is not None:
                on_progress(min(1.0, (first + batch) / starts.size))
    return np.concatenate(rows)


def profile_positions(bits: np.ndarray) -> list[PositionBin]:
    """Mean bits per byte over bins of context length that double: 1, 2-3, 4-7, ... from ``bits`` (W, N)."""
    bins = []
    first = 1
    while first <= bits.shape[1]:
        last = min(2 * first - 1, bits.shape[1])
        # Column p has p + 1 bytes of context before its target.
        bins.append(PositionBin(first, last, Estimate.over_windows(bits[:, first - 1 : last].mean(axis=1))))
        first *= 2
    # When N is a power of two the last bin has one position, N: too few for a bin of its own.
    if len(bins) > 1 and bins[-1].last - bins[-1].first + 1 < bins[-2].first // 2:
        low = bins[-2].first
        merged = PositionBin(low, bins[-1].last, Estimate.over_windows(bits[:, low - 1 :].mean(axis=1)))
        bins[-2:] = [merged]
    return bins


def cut_lengths(context: int) -> list[int]:
    """Lengths to cut a context of N bytes to: N/128, N/32, N/8 and N/2, those of at least 16 bytes (or N/2 alone)."""
    lengths = [context // part for part in (128, 32, 8, 2)]
    return [length for length in lengths if length >= 16] or [length for length in lengths if length >= 2]


def compare_cut(
    bits: np.ndarray, starts: np.ndarray, length: int, score: Callable[[int, np.ndarray], np.ndarray]
) -> CutContext:
    """Score bytes of the second half of whole windows again, with no more than ``length`` bytes of context.

    The half is cut into windows of ``length`` bytes, and the second half of each of them counts: bytes with at least half
    of that context. A window of N / 2^k bytes starts at a multiple of its length, so the bytes keep their places in every
    segment that divides it. The comparison is of contexts, not of places in a segment.

    Args:
        bits: (W, N), the whole windows' bits.
        starts: (W,) where they begin.
        length: of the short windows, 2 to N / 2.
        score: ``score(length, starts)`` gives the bits of other windows, (windows, length).

    Raises:
        ValueError: a length out of range.
    """
    windows, context = bits.shape
    half, before = context // 2, length - length // 2
    if not 2 <= length <= half:
        raise ValueError(f"length={length}: expected 2 to {half}, half a context")
    tiles = (context - half) // length
    offsets = half + length * np.arange(tiles)
    shape = (windows, tiles, length)
    short = score(length, (starts[:, None] + offsets).reshape(-1)).reshape(shape)[:, :, before:]
    whole = bits[:, half : half + tiles * length].reshape(shape)[:, :, before:]
    cut, full = short.mean(axis=(1, 2), dtype=np.float64), whole.mean(axis=(1, 2), dtype=np.float64)
    return CutContext(
        first=before + 1,
        last=length,
        full_first=half + before + 1,
        full_last=half + tiles * length,
        cut=float(cut.mean()),
        full=float(full.mean()),
        gain=Estimate.over_windows(cut - full),
    )
