"""Mixing in a branch without values in one kernel: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longnet.nn import rescale_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALLOWED = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
HAS_TRITON = importlib.util.find_spec("triton") is not None


def expected(out: Tensor, lse: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, by the definition; a row that neither reached is 0."""
    wide, less = lse.double(), other.double()
    merged = (wide.exp() + less.exp()).log()
    share = torch.where(merged == -torch.inf, 0.0, wide.exp() / merged.exp())
    return out.double() * share.unsqueeze(-1), merged


@settings(max_examples=40)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    length=st.sampled_from([1, 7, 64, 130]),
    channels=st.sampled_from([1, 8, 48, 64]),
    dtype=st.sampled_from(list(ALLOWED)),
    by_kernel=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_it_is_the_definition(batch, heads, length, channels, dtype, by_kernel, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    out = draw(batch, length, heads, channels).to(DEVICE, dtype).transpose(1, 2)
    lse, other = (3 * draw(batch, heads, length)).to(DEVICE, kind), (3 * draw(heads, length)).to(DEVICE, kind)
    other[:, ::3] = -torch.inf
    lse[:, :, ::2] = -torch.inf
    wanted, merged = expected(out, lse, other)
    if by_kernel and dtype != torch.float64:
        if not HAS_TRITON:
            pytest.skip("needs triton")
        found = sys.modules["longnet.nn.rescale"]._rescale(out, lse, other)
    else:
        found = rescale_(out, lse, other)
    assert (out.double() - wanted).abs().max() <= ALLOWED[dtype] * 5
    torch.testing.assert_close(found.double(), merged, rtol=1e-6, atol=1e-6)
