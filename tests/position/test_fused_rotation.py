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
    st.sampled_from((torch.float32, torch.bfloat16)),
    st.randoms(use_true_random=False),
)
@settings(max_examples=100, deadline=None)
def test_tokens_are_rotated_as_by_tables(
    kind, dim, heads, batch, length, start, scale_base, streaming, by_row, dtype, random
):
    torch.manual_seed(random.randrange(1 << 30))
    xpos = XPos(dim, PATTERNS[kind], True, scale_base)
    # As a projection gives them, not contiguous; and a key whose channels are no neighbours.
    query = torch.randn(batch, length, heads[0], dim, dtype=dtype).transpose(1, 2)
    key = torch.randn(batch, heads[1], length, 2 * dim, dtype=dtype)[..., ::2]
    offset = torch.tensor([[random.randrange(-100, 100)] for _ in range(batch)]) if by_row else random.choice((0, 13))
    if streaming:
        counter = torch.tensor(start)
        at = Positions(start, length, streaming=True, counter=counter, segment_offset=offset if by_row else 0)
    else:
        at = Positions(start, start + length + 50, segment_offset=offset)
    assert fused.fits(query, key)
    leaves = [x.detach().requires_grad_() for x in (query, key)]
    exact = [x.detach().double().requires_grad_() for x in (query, key)]
    rotated, wanted = xpos(*leaves, at), by_tables(xpos, *exact, at)
    # Results of bfloat16 are rounded by 2**-8 at most.
    error = 1e-6 if dtype == torch.float32 else 1.01 * 2**-8
    for one, other in zip(rotated, wanted, strict=True):
        assert one.dtype == dtype
        assert (one - other).norm() <= error * other.norm()
    upstream = [torch.randn_like(x) for x in rotated]
    grads = torch.autograd.grad(rotated, leaves, upstream)
    for one, other in zip(grads, torch.autograd.grad(wanted, exact, [x.double() for x in upstream]), strict=True):
        assert (one - other).norm() <= error * other.norm()


@pytest.mark.parametrize("kind", list(PATTERNS))
@pytest.mark.parametrize("start", [0, 6000])
def test_half_precision_loses_nothing_but_the_rounding_of_results(kind, start):
    xpos = XPos(64, PATTERNS[kind], True)
    query, key = (torch.randn(1, 2, 300, 64, dtype=torch.float16) for _ in range(2))
    at = Positions(start, start + 300)
    for one, other in zip(xpos(query, key, at), by_tables(xpos, query, key, at), strict=True):
        assert one.dtype == torch.float16
        assert (one - other).norm() <= 1.01 * (other.half() - other).norm()


@pytest.mark.parametrize("kind", list(PATTERNS))
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_rotation_is_one_operator(kind, backend):
    """It gives what it gives uncompiled, and the gradient of its gradient too."""
    xpos, graphs = XPos(16, PATTERNS[kind], True, 5000.0), []
    given = torch.randn(2, 35, 6, 16, requires_grad=True)

    def rotated(x):
        query, key = x[:, :, :4].transpose(1, 2), x[:, :, 4:].transpose(1, 2)
        return torch.cat(xpos(2.0 * query, 2.0 * key, Positions(0, 35)), 1)

    def compiler(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch.compiler.reset()
    outs = [call(given) for call in (rotated, torch.compile(rotated, fullgraph=True, backend=compiler))]
    assert [node.target for node in graphs[0].graph.nodes if "rotate" in str(node.target)] == [
        torch.ops.longnet.rotate.default
    ]
    assert "cos" not in graphs[0].code
    torch.testing.assert_close(outs[1], outs[0])
    grads = [torch.autograd.grad(out.square().sum(), given)[0] for out in outs]
    torch.testing.assert_close(grads[1], grads[0])
    # Rotated there and back, what is scaled is scaled twice.
    (first,) = torch.autograd.grad(rotated(given).pow(3).sum(), given, create_graph=True)
    exact = given.detach().double().requires_grad_()
    tables = xpos.tables(35, torch.float64)
    turned = torch.cat(
        [
            rotate(2.0 * x.transpose(1, 2), *which)
            for x, which in ((exact[:, :, :4], tables[:2]), (exact[:, :, 4:], tables[2:]))
        ],
        1,
    )
    (first_exact,) = torch.autograd.grad(turned.pow(3).sum(), exact, create_graph=True)
    seconds = [torch.autograd.grad(one.square().sum(), x)[0] for one, x in ((first, given), (first_exact, exact))]
    torch.testing.assert_close(seconds[0], seconds[1].float(), rtol=1e-4, atol=1e-3)


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
    query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8)
    assert not fused.fits(query.double(), key.double())
    assert not fused.fits(query.bfloat16(), key) and not fused.fits(query[:, :0], key[:, :0])
    seen = []
    torch.func.vmap(lambda x: seen.append(fused.fits(x, x)) or x)(query)
    assert seen == [False]
