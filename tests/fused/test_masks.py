"""Masks of dropout: as often as asked, everywhere, and others for another seed."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from longnet.nn import keep_masks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.25, 0.9, 1.0])
def test_as_often_as_asked(probability):
    torch.manual_seed(0)
    kept = keep_masks((2, 3, 51, 97), probability, DEVICE)
    assert kept.shape == (2, 3, 51, 97) and kept.dtype == torch.bool and kept.is_contiguous()
    assert set(kept.view(torch.uint8).unique().tolist()) <= {0, 1}
    # Four standard deviations of so many draws, over all and over every eighth.
    for some in (kept.flatten(), *(kept.flatten()[k::8] for k in range(8))):
        allowed = 4 * (probability * (1 - probability) / some.numel()) ** 0.5
        assert abs(float((~some).float().mean()) - probability) <= allowed + 1e-6


def test_neighbours_and_draws_know_nothing_of_each_other():
    torch.manual_seed(0)
    first, second = (keep_masks((40_000,), 0.5, DEVICE).float() - 0.5 for _ in range(2))
    pairs = [(first, second), *((first[:-k], first[k:]) for k in (1, 2, 4, 8, 16))]
    for one, other in pairs:
        assert abs(float((one * other).mean())) * 4 <= 4 / one.numel() ** 0.5


def test_the_generator_decides():
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(keep_masks((5, 33), 0.3, DEVICE))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert keep_masks((0, 7), 0.3, DEVICE).shape == (0, 7)


def test_nothing_is_left_unwritten():
    module = sys.modules["longnet.nn.dropout_masks"]
    for count in (1, 7, 8, 9, 4095, 4097):
        kept = module._run(torch.tensor([5], device=DEVICE), [count], 0)
        assert kept.shape == (count,) and bool(kept.all())
