"""Scores by position and what is concluded from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from longnet.models import LongNetConfig, LongNetLM
from longnet.training.evaluate import (
    Estimate,
    compare_cut,
    cut_lengths,
    profile_positions,
    score_windows,
    window_starts,
)


def test_windows_score_every_byte_but_the_first_once() -> None:
    starts = window_starts(101, 20)
    scored = np.concatenate([np.arange(start + 1, start + 21) for start in starts])
    assert scored.tolist() == list(range(1, 101))


def test_a_limit_spreads_windows_over_the_whole() -> None:
    starts = window_starts(1001, 10, limit=5)
    assert starts.tolist() == [0, 250, 500, 740, 990]


def test_too_few_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="context=20 needs 21 held-out bytes: there are 20"):
        window_starts(20, 20)


def test_scores_are_bits_of_each_target_whatever_the_batch() -> None:
    torch.manual_seed(0)
    model = LongNetLM(LongNetConfig.preset("nano", dropout=0.5)).train()
    stream = np.random.default_rng(0).integers(0, 256, 200).astype(np.uint8)
    starts = window_starts(stream.size, 32)
    one = score_windows(model, stream, 32, starts, batch=1, device=torch.device("cpu"))
    many = score_windows(model, stream, 32, starts, batch=4, device=torch.device("cpu"))
    assert one.shape == (6, 32)
    np.testing.assert_allclose(one, many, rtol=1e-5)
    assert model.training
    model.eval()
    row = torch.from_numpy(stream[32:65].astype(np.int64))[None]
    with torch.no_grad():
        nats = F.cross_entropy(model(row[:, :-1])[0], row[0, 1:], reduction="none")
    np.testing.assert_allclose(one[1], nats.numpy() / math.log(2), rtol=1e-4)


def test_an_estimate_has_an_interval_over_windows() -> None:
    estimate = Estimate.over_windows(np.array([1.0, 2.0, 3.0]))
    assert estimate.mean == 2.0
    assert estimate.low == pytest.approx(2 - 1.959964 / math.sqrt(3))
    assert estimate.high == pytest.approx(2 + 1.959964 / math.sqrt(3))
    assert Estimate.over_windows(np.array([1.0])) == Estimate(1.0, None, None)


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (1, [(1, 1)]),
        (8, [(1, 1), (2, 3), (4, 8)]),
        (15, [(1, 1), (2, 3), (4, 7), (8, 15)]),
        (64, [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 64)]),
    ],
)
def test_bins_double_and_cover_every_position_once(length: int, expected: list[tuple[int, int]]) -> None:
    bits = np.tile(np.arange(1.0, length + 1), (2, 1))
    bins = profile_positions(bits)
    assert [(one.first, one.last) for one in bins] == expected
    assert [one.bits_per_byte.mean for one in bins] == [(first + last) / 2 for first, last in expected]


def test_cut_lengths_go_down_from_half_a_context() -> None:
    assert cut_lengths(8192) == [64, 256, 1024, 4096]
    assert cut_lengths(256) == [32, 128]
    assert cut_lengths(16) == [2, 8]
    assert cut_lengths(5) == [2]
    assert cut_lengths(3) == []


@pytest.mark.parametrize(("context", "length"), [(64, 2), (64, 8), (64, 32), (61, 30), (61, 7)])
def test_a_cut_context_is_compared_on_the_same_bytes(context: int, length: int) -> None:
    """Byte t costs t % 7 bits, and a quarter bit less when more than 30 bytes come before it in its window."""
    base = np.arange(2000) % 7
    starts = np.arange(0, 1900, context)
    scored: list[np.ndarray] = []

    def cost(length: int, at: np.ndarray) -> np.ndarray:
        scored.append(at)
        saved = 0.25 * (np.arange(1, length + 1) > 30)
        return np.stack([base[start + 1 : start + length + 1] - saved for start in at])

    cut = compare_cut(cost(context, starts), starts, length, cost)
    assert cut.last == length and cut.full_first == context // 2 + cut.first and cut.full_last <= context
    offsets = np.unique((scored[1] - context // 2) % context)
    assert offsets.tolist() == list(range(0, (context - context // 2) // length * length, length))
    saved_when_cut = 0.25 * np.mean(np.arange(cut.first, cut.last + 1) > 30)
    assert cut.gain.mean == pytest.approx(0.25 - saved_when_cut)
    assert cut.gain.low == pytest.approx(cut.gain.mean) and cut.gain.high == pytest.approx(cut.gain.mean)
    assert cut.cut - cut.full == pytest.approx(cut.gain.mean)


@pytest.mark.parametrize("length", [1, 33])
def test_a_cut_out_of_range_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"length={length}: expected 2 to 32"):
        compare_cut(np.zeros((2, 64)), np.array([0, 64]), length, lambda length, at: np.zeros((at.size, length)))
