"""torchscale's attention against a dense one that pads with real zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import upstream
from torch import Tensor

from longnet.attention.call import AttentionSpec
from longnet.attention.functional import dilated_attention
from longnet.compat import torchscale_attention
from longnet.geometry import Pattern

# GigaPath's own series, one that pads its segments, odd lengths, rates above the heads' number, branches of one length.
PATTERNS = [
    ((1024, 5792, 32768), (1, 2, 4)),
    ((64, 193, 450, 2000), (1, 2, 4, 8)),
    ((50, 101), (3, 7)),
    ((40,), (1,)),
    ((33, 33, 70), (2, 5, 16)),
]


def draw(
    tokens: int, heads: int = 4, dim: int = 4, batch: int = 2, seed: int = 0, dtype: Any = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, heads, tokens, dim, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)
    ]


def error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.filterwarnings("ignore:.*to no head")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tokens", [3, 64, 101, 600, 1100])
def test_it_is_what_torchscale_computes(tokens: int, pattern: tuple[Any, Any], is_causal: bool) -> None:
    *inputs, grad = draw(tokens, heads=5)
    grad_lse = grad[..., 0]
    ours = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.clone().requires_grad_() for x in inputs]
    out, lse = torchscale_attention(*ours, *pattern, is_causal=is_causal, return_lse=True)
    want, want_lse = upstream.attention(*theirs, *pattern, is_causal)
    assert error(out, want) < 1e-10
    reached = ~want_lse.isinf()
    assert torch.equal(lse.isinf(), ~reached)
    assert error(lse[reached], want_lse[reached]) < 1e-10
    total = (out * grad).sum() + (lse[reached] * grad_lse[reached]).sum()
    want_total = (want * grad).sum() + (want_lse[reached] * grad_lse[reached]).sum()
    for got, expected in zip(torch.autograd.grad(total, ours), torch.autograd.grad(want_total, theirs), strict=True):
        assert error(got, expected) < 1e-9


@pytest.mark.filterwarnings("ignore:.*to no head")
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_in_other_types(dtype: torch.dtype, allowed: float) -> None:
    query, key, value, _ = draw(700, dtype=dtype)
    out, lse = torchscale_attention(query, key, value, *PATTERNS[1], return_lse=True)
    want, want_lse = upstream.attention(query.double(), key.double(), value.double(), *PATTERNS[1])
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert error(out, want) < allowed
    assert error(lse, want_lse) < allowed


@pytest.mark.filterwarnings("ignore:.*to no head")
def test_where_nothing_is_padded_it_is_the_definition() -> None:
    query, key, value, _ = draw(128)
    got = torchscale_attention(query, key, value, (32, 64), (1, 2))
    want = dilated_attention(query, key, value, (32, 64), (1, 2), head_offsets="blocked")
    assert torch.equal(got, want)
    other = torchscale_attention(query[:, :, :100], key[:, :, :100], value[:, :, :100], (32, 64), (1, 2))
    exact = dilated_attention(
        query[:, :, :100], key[:, :, :100], value[:, :, :100], (32, 64), (1, 2), head_offsets="blocked"
    )
    # In the last segments, and there only.
    assert torch.equal(other[:, :, :64], exact[:, :, :64])
    assert error(other[:, :, 96:], exact[:, :, 96:]) > 1e-3


@pytest.mark.filterwarnings("ignore:.*to no head")
@pytest.mark.parametrize("pattern", PATTERNS[:2])
def test_each_row_of_a_batch_is_as_if_alone(pattern: tuple[Any, Any]) -> None:
    query, key, value, grad = draw(300, batch=3)
    absent = torch.rand(3, 300, generator=torch.Generator().manual_seed(1)) < 0.4
    absent[1] = False
    absent[2, :] = True
    absent[2, 17] = False
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out, lse = torchscale_attention(*leaves, *pattern, key_padding_mask=absent, return_lse=True)
    grads = torch.autograd.grad((out * grad).sum(), leaves)
    assert not out[absent[:, None].expand_as(lse)].any() and lse[absent[:, None].expand_as(lse)].isinf().all()
    for row in range(3):
        present = ~absent[row]
        alone = [x[row : row + 1, :, present].detach().requires_grad_() for x in leaves]
        want = torchscale_attention(*alone, *pattern)
        assert torch.equal(out[row, :, present], want[0])
        for got, expected in zip(grads, torch.autograd.grad((want * grad[row, :, present]).sum(), alone), strict=True):
            torch.testing.assert_close(got[row, :, present], expected[0], rtol=1e-12, atol=1e-12)
            assert not got[row, :, ~present].any()


def test_nothing_at_all() -> None:
    empty = torch.randn(2, 4, 0, 8)
    assert torchscale_attention(empty, empty, empty, 4, 2).shape == empty.shape
    none = torch.randn(0, 4, 5, 8)
    mask = torch.zeros(0, 5, dtype=torch.bool)
    assert torchscale_attention(none, none, none, 4, 2, key_padding_mask=mask).shape == none.shape


def test_grouped_heads_and_a_scale() -> None:
    query, key, value, _ = draw(90)
    key, value = key[:, :2], value[:, :2]
    got = torchscale_attention(query, key, value, (16, 45), (1, 2), scale=0.3)
    repeated = [x.repeat_interleave(2, 1) for x in (key, value)]
    want = upstream.attention(query * 0.3 * 4**0.5, *repeated, (16, 45), (1, 2))[0]
    assert error(got, want) < 1e-10


def test_bad_input() -> None:
    x = torch.randn(1, 2, 8, 4)
    with pytest.raises(ValueError, match="differ in length"):
        torchscale_attention(x, x, x, (4, 8), 1)
    with pytest.raises(ValueError, match="key has shape"):
        torchscale_attention(x, x[:, :, :4], x, 4, 1)
    with pytest.raises(TypeError, match="key_padding_mask has dtype"):
        torchscale_attention(x, x, x, 4, 1, key_padding_mask=torch.zeros(1, 8))
    with pytest.raises(ValueError, match="backend='no' is unknown"):
        torchscale_attention(x, x, x, 4, 1, backend="no")


@pytest.mark.parametrize("pattern", [((16, 27), (1, 2)), ((9,), (4,))])
@pytest.mark.parametrize("backend", ["cpu_flash", "portable"])
def test_opcheck(pattern: tuple[tuple[int, ...], tuple[int, ...]], backend: str) -> None:
    *inputs, grad = draw(40, dtype=torch.float32)
    settings = AttentionSpec(Pattern.parse(*pattern, "blocked"), False, 0.3).encode()
    forward, backward = (
        getattr(torch.ops.longnet, f"torchscale_{backend}{part}").default for part in ("", "_backward")
    )
    torch.library.opcheck(forward, (*[x.requires_grad_() for x in inputs], None, None, None, *settings))
    inputs = [x.detach() for x in inputs]
    out, lse = forward(*inputs, None, None, None, *settings)
    for grad_lse in (None, torch.randn_like(lse)):
        arguments = (grad, grad_lse, *inputs, None, None, None, out, lse, *settings)
        torch.library.opcheck(
            backward, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        )


def test_it_compiles_and_exports_for_all_lengths() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torchscale_attention(q, k, v, (16, 27), (1, 2))
        assert isinstance(out, Tensor)
        return out

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (40, 61, 12):
        ours, theirs = ([x.clone().requires_grad_() for x in draw(tokens)[:3]] for _ in range(2))
        out, want = compiled(*ours), attend(*theirs)
        assert error(out, want) < 1e-12
        grads = zip(torch.autograd.grad(out.sum(), ours), torch.autograd.grad(want.sum(), theirs), strict=True)
        assert all(error(one, other) < 1e-12 for one, other in grads)

    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v)

    tokens = torch.export.Dim("tokens", min=2, max=4096)
    exported = torch.export.export(Attend(), tuple(draw(40)[:3]), dynamic_shapes=[{2: tokens}] * 3)
    inputs = draw(333)[:3]
    assert error(exported.module()(*inputs), attend(*inputs)) < 1e-12


def test_a_second_derivative_is_refused() -> None:
    q, k, v = (x.requires_grad_() for x in draw(20)[:3])
    out = torchscale_attention(q, k, v, (16,), (1,))
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:.*to no head", "ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("backend", ["cpu_flash", "portable"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("pattern", [PATTERNS[1], PATTERNS[2]])
def test_queries_of_dead_rows_never_matter(pattern: tuple[Any, Any], is_causal: bool, backend: str) -> None:
    """Where outputs are shifted too: rows that a query reaches without a gradient get none from it."""
    *inputs, grad = draw(600)
    places = torch.zeros(600, dtype=torch.bool)
    places[[3, 100, 349, 350, 599]] = True
    query = inputs[0].masked_fill(places[:, None], torch.nan)
    reached = (
        torchscale_attention(query, *inputs[1:], *pattern, is_causal=is_causal, backend="portable").isnan().any(-1)
    )
    assert reached[..., ~places].any() == any(w % r for w, r in zip(*pattern, strict=True))
    grad = grad.masked_fill(reached[..., None], 0.0)
    results = []
    for q in (inputs[0], query):
        given = [x.clone().requires_grad_() for x in (q, *inputs[1:])]
        out = torchscale_attention(*given, *pattern, is_causal=is_causal, backend=backend)
        results.append(torch.autograd.grad(out, given, grad))
    for want, got in zip(*results, strict=True):
        assert torch.equal(got, want) and want.any()
    assert not results[1][0][:, :, places].any()
