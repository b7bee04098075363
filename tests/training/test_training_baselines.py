"""Baselines in bits per byte."""

from __future__ import annotations

import lzma
import math

import numpy as np
import pytest

from longnet.training.baselines import count_tokens, cross_entropy, measure_baselines
from longnet.training.data import BYTES


def test_entropy_of_two_equal_bytes_is_one_bit() -> None:
    counts = count_tokens(np.array([7, 9, 7, 9], dtype=np.uint8), 256)
    assert counts.sum() == 4 and counts[7] == counts[9] == 2
    assert cross_entropy(counts, counts) == pytest.approx(1.0)


def test_a_code_without_a_byte_costs_infinitely_much() -> None:
    assert cross_entropy(np.array([1, 1]), np.array([1, 0])) == math.inf


def test_all_three_on_the_same_bytes() -> None:
    generator = np.random.default_rng(0)
    train = generator.integers(97, 101, 4000).astype(np.uint8)
    held_out = generator.integers(97, 101, 2000).astype(np.uint8)
    result = measure_baselines(train, held_out, BYTES, 1.0)
    assert result.unigram_own <= result.unigram < 2.2
    assert result.unigram_own == pytest.approx(2.0, abs=0.01)
    packed = lzma.compress(held_out.tobytes(), preset=9 | lzma.PRESET_EXTREME)
    assert result.lzma == 8 * len(packed) / 2000
    assert result.compressed_bytes == 2000


def test_a_byte_that_training_never_saw_costs_a_finite_amount() -> None:
    result = measure_baselines(np.full(744, 65, dtype=np.uint8), np.array([66], dtype=np.uint8), BYTES, 1.0)
    assert result.unigram == pytest.approx(math.log2(1000))


def test_no_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="held_out is empty"):
        measure_baselines(np.zeros(4, dtype=np.uint8), np.zeros(0, dtype=np.uint8), BYTES, 1.0)
