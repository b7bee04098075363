"""What the held-out bytes cost without a model: order-0 entropy and a general compressor, in bits per byte."""

from __future__ import annotations

import lzma
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from longnet.training.data import BytesOnDisk

_CHUNK = 1 << 24


@dataclass(frozen=True)
class Baselines:
    """Bits per byte of the same bytes.

    Attributes:
        unigram: cross-entropy under the byte frequencies of the training data (every count plus one, so that none is 0).
        unigram_own: entropy of the held-out bytes' own frequencies, the lower bound of any order-0 code.
        lzma: ``lzma`` preset 9 | EXTREME, container included. It reads all bytes as one stream, not in windows.
    """

    unigram: float
    unigram_own: float
    lzma: float


def measure_baselines(
    train: np.ndarray | BytesOnDisk, held_out: np.ndarray, say: Callable[[str], None] | None = None
) -> Baselines:
    """Measure all three on ``held_out`` (bytes,) uint8; ``train`` (bytes,) uint8 gives the frequencies.

    Raises:
        ValueError: no held-out bytes.
    """
    if held_out.size == 0:
        raise ValueError("held_out is empty: expected at least one byte")
    tell = say or (lambda text: None)
    tell(f"Counting bytes for the unigram baseline ({train.size:,} training bytes)")
    counts, own = count_bytes(train) + 1, count_bytes(held_out)
    tell(f"Compressing {held_out.size:,} held-out bytes with lzma, preset 9 | EXTREME")
    packed = len(lzma.compress(held_out.tobytes(), preset=9 | lzma.PRESET_EXTREME))
    return Baselines(cross_entropy(own, counts), cross_entropy(own, own), 8.0 * packed / held_out.size)


def count_bytes(stream: np.ndarray | BytesOnDisk) -> np.ndarray:
    """How often each byte value occurs in ``stream``: (256,) int64. Reads in chunks, so a large file stays on disk."""
    counts = np.zeros(256, dtype=np.int64)
    for start in range(0, stream.size, _CHUNK):
        counts += np.bincount(stream[start : start + _CHUNK], minlength=256)
    return counts


def cross_entropy(counts: np.ndarray, code: np.ndarray) -> float:
    """Bits per symbol of ``counts`` (256,) coded with the frequencies ``code`` (256,): inf if the code lacks one."""
    seen = counts > 0
    with np.errstate(divide="ignore"):
        bits = -np.log2(code[seen] / code.sum())
    return float((counts[seen] * bits).sum() / counts.sum())
