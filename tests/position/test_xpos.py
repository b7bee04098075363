"""xPos at positions where float32 angles and unbounded scales fail."""

from __future__ import annotations

import math

import pytest
import torch

from longnet import DilatedAttention
from longnet.geometry import Pattern
from longnet.nn.position import XPos, rotate


def scores(xpos: XPos, q: torch.Tensor, k: torch.Tensor, start: int, dtype: torch.dtype) -> torch.Tensor:
    cos_q, sin_q, cos_k, sin_k = xpos.tables(q.shape[-2], dtype, start=start)
    return rotate(q.to(dtype), cos_q, sin_q).double() @ rotate(k.to(dtype), cos_k, sin_k).double().transpose(-1, -2)


@pytest.mark.parametrize("start", [0, 1 << 20, 10**9])
def test_scores_depend_on_the_distance_alone_at_any_position(start):
    """A window's scores at a billion are those at 0. Rotations are exact in float64 up to 1e9 * 2**-53 turns."""
    torch.manual_seed(0)
    xpos = XPos(8, Pattern.parse(1 << 30, 1), True)
    q, k = torch.randn(16, 8, dtype=torch.float64), torch.randn(16, 8, dtype=torch.float64)
    here = scores(xpos, q, k, start - start % 2048, torch.float64).tril()
    there = scores(xpos, q, k, 0, torch.float64).tril()
    torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", [71_000, 10**6, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_stay_finite_and_scores_right_far_out(start, dtype):
    torch.manual_seed(0)
    pattern = Pattern.parse((2048, 32768), (1, 8))
    xpos = XPos(64, pattern, True)
    # One whole longest segment, so that the scales reach their extremes.
    start -= start % 32768
    length = 32768
    tables = xpos.tables(length, dtype, start=start)
    assert all(table.isfinite().all() for table in tables)
    rows = torch.tensor([0, 1, 5_000, 16_384, 32_000, 32_767])
    q, k = torch.randn(len(rows), 64), torch.randn(len(rows), 64)
    far = rotate(q, tables[0][rows], tables[1][rows]).double() @ rotate(k, tables[2][rows], tables[3][rows]).double().T
    exact = XPos(64, pattern, True).tables(length, torch.float64, start=0)
    near = rotate(q.double(), exact[0][rows], exact[1][rows]) @ rotate(k.double(), exact[2][rows], exact[3][rows]).T
    torch.testing.assert_close(far.tril(), near.tril(), rtol=1e-3, atol=1e-3)


def test_the_default_scale_base():
    assert XPos(8, Pattern.parse(2048, 1), True).scale_base == 512
    assert XPos(8, Pattern.parse((2048, 1 << 20), (1, 8)), True).scale_base == (1 << 20) / 128
    assert XPos(8, Pattern.parse(32768, 1), False).scale_base == 512
    assert XPos(8, Pattern.parse(1 << 20, 1), False).scale_base == (1 << 20) / 64


@pytest.mark.parametrize("causal", [False, True])
def test_a_long_module_stays_finite(causal):
    module = DilatedAttention(8, 2, (1, 64), (64, 1 << 17), causal=causal, use_xpos=True)
    out = module(torch.randn(1, 100_000, 8))
    assert out.isfinite().all()


def test_segments_without_common_boundaries_share_one_window():
    pattern = Pattern.parse((1000, 1001, 1003), (1, 2, 3))
    xpos = XPos(8, pattern, True)
    assert not xpos.endless
    assert all(table.isfinite().all() for table in xpos.tables(60_000, torch.float32))
    with pytest.raises(ValueError, match="overflow torch.float32 past .* tokens with xpos_scale_base=512"):
        xpos.tables(1_000_000, torch.float32)
    XPos(8, pattern, True, scale_base=10_000).tables(1_000_000, torch.float32)


def test_float16_says_when_its_range_is_too_small():
    xpos = XPos(8, Pattern.parse(32768, 1), True)
    q_tables = xpos.tables(6_000, torch.float16)
    assert max(table.abs().max() for table in q_tables) < math.exp(9)
    with pytest.raises(ValueError, match=r"overflow torch.float16 past .*expected xpos_scale_base of at least"):
        xpos.tables(32768, torch.float16)
