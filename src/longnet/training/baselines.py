"""What the held-out bytes cost without a model: order-0 entropy and a general compressor, in bits per byte."""

from __future__ import annotations

import lzma
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from longnet.training.data import Stream, Tokenizer

_CHUNK = 1 << 24


@dataclass(frozen=True)
class Baselines:
    """Bits per byte of the same bytes.

    Attributes:
        unigram: cross-entropy under the frequencies of the training data's tokens (every count plus one, so that none is 0).
        unigram_own: entropy of the held-out bytes' own frequencies, the lower bound of any order-0 code.
        lzma: ``lzma`` preset 9 | EXTREME, container included. It reads all bytes as one stream, not in windows.
        compressed_bytes: how many bytes of text ``lzma`` compressed.
    """

    unigram: float
    unigram_own: float
    lzma: float
    compressed_bytes: int


def measure_baselines(
    train: Stream,
    held_out: np.ndarray,
    tokenizer: Tokenizer,
    tokens_per_byte: float,
    say: Callable[[str], None] | None = None,
) -> Baselines:
    """Measure all three on the text of ``held_out`` (tokens,); ``train`` (tokens,) gives the frequencies.

    Bytes are those of the text that was tokenised. The decoded text may have fewer.

    Raises:
        ValueError: no held-out tokens.
    """
    if held_out.size == 0:
        raise ValueError("held_out is empty: expected at least one token")
    tell, text = say or (lambda line: None), tokenizer.decode(held_out)
    tell(f"Counting tokens for the unigram baseline ({train.size:,} training tokens)")
    counts, own = (count_tokens(one, tokenizer.vocab_size) for one in (train, held_out))
    tell(f"Compressing {len(text):,} held-out bytes with lzma, preset 9 | EXTREME")
    packed = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    unigram, unigram_own = (tokens_per_byte * cross_entropy(own, code) for code in (counts + 1, own))
    return Baselines(unigram, unigram_own, 8.0 * packed * tokens_per_byte / held_out.size, len(text))


def count_tokens(stream: Stream, vocab_size: int) -> np.ndarray:
    """How often each token occurs in ``stream``: (vocab_size,) int64. Reads in chunks, so a large file stays on disk."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, stream.size, _CHUNK):
        counts += np.bincount(stream[start : start + _CHUNK], minlength=vocab_size)
    return counts


def cross_entropy(counts: np.ndarray, code: np.ndarray) -> float:
    """Bits per symbol of ``counts`` (tokens,) coded with the frequencies ``code`` (tokens,): inf if the code lacks one."""
    seen = counts > 0
    with np.errstate(divide="ignore"):
        bits = -np.log2(code[seen] / code.sum())
    return float((counts[seen] * bits).sum() / counts.sum())
