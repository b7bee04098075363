"""The kernel that rotates a single token, in Triton's interpreter: what the tables of any other path give."""

from __future__ import annotations

import importlib.util

import interpreted
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longnet.geometry import Pattern
from longnet.nn.position import Positions, XPos, one_token, rotate

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
        patch.setenv("TRITON_INTERPRET", "1")
        yield


@given(
    st.sampled_from(list(PATTERNS)),
    st.sampled_from((2, 6, 64)),
    st.sampled_from(((1, 1), (4, 2), (3, 3))),
    st.integers(1, 3),
    st.integers(0, 60_000),
    st.sampled_from((None, 777.7, 5000.0)),
    st.booleans(),
    st.randoms(use_true_random=False),
)
@settings(max_examples=40, deadline=None)
def test_a_token_is_rotated_as_by_tables(kind, dim, heads, batch, position, scale_base, by_row, random):
    torch.manual_seed(random.randrange(1 << 30))
    xpos = XPos(dim, PATTERNS[kind], True, scale_base)
    # As a projection gives them, not contiguous; and a query whose channels are no neighbours.
    query = torch.randn(batch, 1, heads[0], dim).transpose(1, 2)
    key = torch.randn(batch, heads[1], 1, 2 * dim)[..., ::2]
    offsets = torch.tensor([random.randrange(-100, 100) for _ in range(batch)]) if by_row else None
    at = Positions(
        position, 1, streaming=True, counter=torch.tensor(position),
        segment_offset=0 if offsets is None else offsets[:, None],
    )  # fmt: skip
    assert one_token.fits(query, key)
    got = xpos(query, key, at)
    tables = xpos.tables(1, torch.float64, start=position, streaming=True, segment_offset=at.segment_offset)
    if tables[0].dim() == 3:
        tables = tuple(table.unsqueeze(1) for table in tables)
    want = rotate(query.double(), *tables[:2]), rotate(key.double(), *tables[2:])
    for one, other in zip(got, want, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("position", [2**31 + 7, 10**9, 3 * 2**40])
def test_far_positions_are_exact(position):
    xpos = XPos(8, PATTERNS["nested"], True)
    query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8)
    at = Positions(position, 1, streaming=True, counter=torch.tensor(position))
    tables = xpos.tables(1, torch.float64, start=position, streaming=True)
    for one, other in zip(
        xpos(query, key, at), (rotate(query.double(), *tables[:2]), rotate(key.double(), *tables[2:])), strict=True
    ):
        # A float64 angle of 3e12 has lost about 5e-4.
        assert (one - other).norm() <= (1e-6 + position * 3e-16) * other.norm()


def test_what_it_does_not_take():
    xpos = XPos(8, PATTERNS["nested"], True)
    query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8)
    assert not one_token.fits(query.double(), key.double())
    assert not one_token.fits(query.expand(1, 2, 2, 8), key.expand(1, 2, 2, 8))
    assert not one_token.fits(query.requires_grad_(), key)
    with torch.no_grad():
        assert one_token.fits(query, key)
    # With gradients tables are used, and they flow.
    at = Positions(5, 1, streaming=True, counter=torch.tensor(5))
    rotated, _ = xpos(query, key, at)
    rotated.sum().backward()
    assert query.grad is not None
