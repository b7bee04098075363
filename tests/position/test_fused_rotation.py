"""The kernel that rotates queries and keys, in Triton's interpreter: what the tables of any other path give."""

from __future__ import annotations

import importlib.util

import interpreted
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longnet.geometry import Pattern
from longnet.nn.position import Positions, XPos, fused, rotate

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or importlib.util.find_spec("triton") is None,
    reason="needs triton, and no GPU: with one, kernels are compiled, and test_generate_device.py runs them",
)

PATTERNS = {
    "nested": Pattern.parse((8, 32), (1, 4)),
    "no common boundary": Pattern.parse((1000, 1001, 1003), (1, 2, 3)),
    "window": Pattern.compose(window=16),
}


@pytest.fixture(autouse=True, scope="module")
def interpret():
    interpreted.hasten()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_is_on_gpu", lambda x: True)
        yield


def by_tables(xpos: XPos, query, key, at: Positions):
    """In float64."""
    place = {"streaming": True} if at.streaming else {"whole": at.whole}
    length = query.shape[2]
    tables = xpos.tables(length, torch.float64, start=at.start, segment_offset=at.segment_offset, **place)
    if tables[0].dim() == 3:
        tables = tuple(table.unsqueeze(1) for table in tables)
    return rotate(query.double(), *tables[:2]), rotate(key.double(), *tables[2:])


@given(
    st.sampled_from(list(PATTERNS)),
    st.sampled_from((2, 6, 64)),
    st.sampled_from(((1, 1), (4, 2), (3, 3))),
    st.integers(1, 3),
    st.sampled_from((1, 1, 2, 15, 16, 35)),
    st.integers(0, 20_000),
    st.sampled_from((None, 777.7, 5000.0)),
    st.booleans(),
    st.booleans(),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_tokens_are_rotated_as_by_tables(kind, dim, heads, batch, length, start, scale_base, streaming, by_row, random):
    torch.manual_seed(random.randrange(1 << 30))
    xpos = XPos(dim, PATTERNS[kind], True, scale_base)
    # As a projection gives them, not contiguous; and a key whose channels are no neighbours.
    query = torch.randn(batch, length, heads[0], dim).transpose(1, 2)
    key = torch.randn(batch, heads[1], length, 2 * dim)[..., ::2]
    offset = torch.tensor([[random.randrange(-100, 100)] for _ in range(batch)]) if by_row else random.choice((0, 13))
    if streaming:
        counter = torch.tensor(start)
        at = Positions(start, length, streaming=True, counter=counter, segment_offset=offset if by_row else 0)
    else:
        at = Positions(start, start + length + 50, segment_offset=offset)
    assert fused.fits(query, key)
    for one, other in zip(xpos(query, key, at), by_tables(xpos, query, key, at), strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("position", [2**31 + 7, 10**9, 3 * 2**40])
@pytest.mark.parametrize("length", [1, 3])
def test_far_positions_are_exact(position, length):
    xpos = XPos(8, PATTERNS["nested"], True)
    query, key = torch.randn(1, 2, length, 8), torch.randn(1, 2, length, 8)
    at = Positions(position, length, streaming=True, counter=torch.tensor(position))
    for one, other in zip(xpos(query, key, at), by_tables(xpos, query, key, at), strict=True):
        # A float64 angle of 3e12 has lost about 5e-4.
        assert (one - other).norm() <= (1e-6 + position * 3e-16) * other.norm()


def test_what_it_does_not_take():
    xpos = XPos(8, PATTERNS["nested"], True)
    query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8)
    assert not fused.fits(query.double(), key.double())
    assert not fused.fits(query.requires_grad_(), key)
    with torch.no_grad():
        assert fused.fits(query, key)
    # With gradients tables are used, and they flow.
    rotated, _ = xpos(query, key, Positions(5, 1, streaming=True, counter=torch.tensor(5)))
    rotated.sum().backward()
    assert query.grad is not None
