"""Held-out bits per byte, by position in the context: what a model makes of more bytes before the one it predicts."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from longnet.models import LongNetLM
from longnet.training.data import cut_windows

NORMAL_95 = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Estimate:
    """A mean over windows with its 95 % interval; without an interval (``None``) if there is one window alone."""

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def over_windows(cls, values: np.ndarray) -> Estimate:
        """From one value a window (W,); the windows count as independent, the positions inside one do not."""
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
class LongContextGain:
    """The same held-out bytes scored twice, the second time with ``extra`` more bytes of context before them.

    Attributes:
        first, last: how many bytes of context they had the first time.
        extra: how many more the second time.
        short, long: bits per byte, first and second time.
        gain: bits per byte saved, paired by window; positive when the longer context helps.
    """

    first: int
    last: int
    extra: int
    short: float
    long: float
    gain: Estimate


def window_starts(size: int, context: int, limit: int | None = None) -> np.ndarray:
    """Where to cut windows that score every byte of a stream at most once: (W,) int64, evenly spaced.

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
    model: LongNetLM,
    stream: np.ndarray,
    context: int,
    starts: np.ndarray,
    *,
    batch: int = 1,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    on_progress: Callable[[float], None] | None = None,
) -> np.ndarray:
    """Bits of every target byte: (W, N) float32; column ``p`` is predicted from ``p + 1`` bytes of context.

    Args:
        model: left in the mode (training or evaluation) it was in.
        stream: (bytes,) uint8.
        context: N.
        starts: (W,) from ``window_starts``.
        batch: windows per forward pass.
        device, dtype: of the forward pass (autocast below float32).
        on_progress: called with the share done after every batch.
    """
    was_training = model.training
    model.eval()
    rows = []
    try:
        with torch.inference_mode(), autocast(device, dtype):
            for first in range(0, starts.size, batch):
                tokens, targets = cut_windows(stream, context, starts[first : first + batch])
                nats = model.loss(tokens.to(device), targets.to(device), reduction="none")
                rows.append(nats.float().cpu().numpy() / math.log(2))
                if on_progress is not None:
                    on_progress(min(1.0, (first + batch) / starts.size))
    finally:
        model.train(was_training)
    return np.concatenate(rows)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """The forward pass's autocast; nothing for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def profile_positions(bits: np.ndarray) -> list[PositionBin]:
    """Mean bits per byte over bins of context length that double: 1, 2-3, 4-7, ... from ``bits`` (W, N)."""
    bins = []
    first = 1
    while first <= bits.shape[1]:
        last = min(2 * first - 1, bits.shape[1])
        # Column p has p + 1 bytes of context before its target.
        bins.append(PositionBin(first, last, Estimate.over_windows(bits[:, first - 1 : last].mean(axis=1))))
        first *= 2
    # N bytes of context is one position when N is a power of two: too few for a bin of its own.
    if len(bins) > 1 and bins[-1].last - bins[-1].first + 1 < bins[-2].first // 2:
        low = bins[-2].first
        merged = PositionBin(low, bins[-1].last, Estimate.over_windows(bits[:, low - 1 :].mean(axis=1)))
        bins[-2:] = [merged]
    return bins


def measure_long_context(bits: np.ndarray, late: np.ndarray) -> LongContextGain:
    """What half a context more is worth to bytes that already have a quarter of one.

    Args:
        bits: (W, N), whole windows.
        late: (W, N // 2), windows that start N // 2 bytes later: column ``p`` is the byte of column ``p + N // 2`` of
            ``bits``, scored without the first half of that window.

    Raises:
        ValueError: shapes that do not belong together, or windows too short to have quarters.
    """
    half, quarter = bits.shape[1] // 2, bits.shape[1] // 4
    if late.shape != (bits.shape[0], half) or quarter < 1:
        raise ValueError(f"bits {bits.shape} and late {late.shape}: expected (W, N) and (W, N // 2) with N at least 4")
    short = late[:, quarter:].mean(axis=1)
    long = bits[:, half + quarter : 2 * half].mean(axis=1)
    gain = Estimate.over_windows(short - long)
    return LongContextGain(quarter + 1, half, half, float(short.mean()), float(long.mean()), gain)
