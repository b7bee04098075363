"""A row whose gradients are zero contributes exact zeros, whatever its query is."""

from __future__ import annotations

from dataclasses import replace

import interpreted
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import dense_attention
from patterns import Problem, problems, relative_error
from test_backend_table import ON_CPU
from torch import Tensor

from longnet import dilated_attention
from longnet.attention import merge
from longnet.attention.backends.triton import backend as triton_flash
from longnet.attention.functional import pattern_attention
from longnet.geometry import Pattern

pytestmark = pytest.mark.filterwarnings(
    "ignore:segment_lengths=.*to no head",
    # Of numpy, in Triton's interpreter.
    "ignore:(invalid value|overflow) encountered:RuntimeWarning",
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks and nests of a few tokens, in Triton's interpreter."""
    interpreted.hasten()
    monkeypatch.setattr(triton_flash, "blocks_for", lambda *_: triton_flash.Blocks(16, 16, 4, 1))
    monkeypatch.setattr(triton_flash, "LEAST_ROWS", 1)


def dead_rows(problem: Problem) -> Tensor:
    """(B, H, N): the padded tokens', and some more."""
    generator = torch.Generator().manual_seed(problem.seed + 3)
    dead = torch.rand(problem.batch, problem.heads, problem.length, generator=generator) < 0.3
    mask = problem.mask()
    return dead if mask is None else dead | mask[:, None]


def gradients(
    problem: Problem, backend: str, poisoned: bool, with_lse: bool, bias: Tensor | None, scale: float | None = None
) -> tuple[Tensor, ...]:
    """Of q, k, v and the bias; dead queries are as they are, or ``poisoned``."""
    dead = dead_rows(problem)
    query, key, value = (x.detach() for x in problem.tensors())
    if poisoned:
        # A whole row, or one of its channels.
        places = dead[..., None].expand(query.shape).clone()
        places[:, ::2, :, 1:] = False
        generator = torch.Generator().manual_seed(problem.seed + 4)
        kind = torch.randint(3, (*dead.shape, 1), generator=generator)
        query = torch.where(places, torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=query.dtype)[kind], query)
    inputs = [x.requires_grad_() for x in (query, key, value, *([] if bias is None else [bias]))]
    pattern = Pattern.parse(problem.segment_lengths, problem.dilation_rates, problem.head_offsets)
    out, lse = pattern_attention(
        *inputs[:3], pattern, is_causal=problem.is_causal, scale=scale, key_padding_mask=problem.mask(),
        distance_bias=bias, return_lse=True, backend=backend,
    )  # fmt: skip
    return torch.autograd.grad((out, lse)[: 1 + with_lse], inputs, upstream(problem, out, lse)[: 1 + with_lse])


def upstream(problem: Problem, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    dead = dead_rows(problem)
    grad_out, grad_lse = problem.upstream()
    return grad_out.masked_fill(dead[..., None], 0.0).to(out.dtype), grad_lse.masked_fill(dead, 0.0).to(lse.dtype)


def by_definition(problem: Problem, with_lse: bool, bias: Tensor | None, scale: float | None) -> tuple[Tensor, ...]:
    inputs = [x.detach().double().requires_grad_() for x in (*problem.tensors(), *([] if bias is None else [bias]))]
    score_bias = None
    if bias is not None:
        position, centre = torch.arange(problem.length), bias.shape[1] // 2
        score_bias = inputs[3][:, (position[None, :] - position[:, None]).clamp(-centre, centre) + centre]
    out, lse = dense_attention(
        *inputs[:3], problem.segment_lengths, problem.dilation_rates, scale=scale, score_bias=score_bias,
        **problem.options(),
    )  # fmt: skip
    grad_out, grad_lse = upstream(problem, out, lse)
    both = (grad_out, grad_lse.masked_fill(lse.isinf(), 0.0))
    return torch.autograd.grad((out, lse)[: 1 + with_lse], inputs, both[: 1 + with_lse])


def check(
    problem: Problem, backend: str, tolerance: float, with_lse: bool, bias: Tensor | None = None,
    scale: float | None = None,
) -> None:  # fmt: skip
    expected = by_definition(problem, with_lse, bias, scale)
    finite = gradients(problem, backend, False, with_lse, bias, scale)
    for grad, want in zip(finite, expected, strict=True):
        assert relative_error(grad, want) < tolerance
    got = gradients(problem, backend, True, with_lse, bias, scale)
    assert not got[0][dead_rows(problem)].any()
    for grad, want in zip(got, finite, strict=True):
        assert torch.equal(grad, want)


@pytest.mark.parametrize("backend", ["cpu_flash", "portable"])
@given(problem=problems(), with_lse=st.booleans())
@settings(max_examples=40, deadline=None)
def test_queries_of_dead_rows_never_matter(backend, problem, with_lse):
    check(problem, backend, 1e-10, with_lse)


CASES = {
    "a nest, padded, grouped heads": Problem(
        1, 1, 2, 34, 8, ((8, 1), (16, 2), (32, 4)), True, "interleaved", 0.3, True, 1, torch.float32
    ),
    "nothing nests, not causal": Problem(
        1, 2, 1, 37, 8, ((7, 1), (30, 2)), False, "interleaved", None, False, 2, torch.float32
    ),
    "rows that no branch selects": Problem(
        1, 2, 1, 40, 8, ((20, 3), (33, 7)), True, "blocked", 0.2, True, 3, torch.float32
    ),
    "head dimension 24": Problem(
        1, 2, 1, 20, 24, ((8, 1), (16, 2)), False, "interleaved", 0.2, True, 4, torch.float32
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("name", CASES)
def test_in_every_backend_and_with_a_relative_bias(backend, name):
    problem = CASES[name]
    scale = -0.4 if backend == "triton" and problem.group > 1 else None
    bias = None
    if backend != "cpu_flash" and problem.is_causal:
        reach = min(problem.length, max(problem.segment_lengths))
        bias = torch.randn(problem.heads, 2 * reach - 1, generator=torch.Generator().manual_seed(7))
    check(problem, backend, 1e-4, name != "head dimension 24", bias, scale)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision(backend, dtype):
    """Two runs of the same kernels: what the interpreter makes of a product of bfloat16 matters to neither."""
    problem = replace(CASES["head dimension 24"], dtype=dtype)
    finite = gradients(problem, backend, False, True, None)
    for grad, want in zip(gradients(problem, backend, True, True, None), finite, strict=True):
        assert torch.equal(grad, want) and want.any()


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_row_with_a_gradient_hides_nothing(backend):
    """All gradients that it touches are NaN: a scaler of losses has to see them. So is its lse, but for torch's own kernel."""
    q, k, v = (torch.randn(1, 2, 12, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    q[:, :, 5] = torch.nan
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, lse = dilated_attention(*inputs, 12, 1, return_lse=True, backend=backend)
    if backend != "cpu_flash":
        assert lse.isnan().nonzero()[:, 2].unique().tolist() == [5]
    grad_out, grad_lse = torch.zeros_like(out), torch.zeros_like(lse)
    for one, gradient in ((grad_out[:, :, 5, 3], 0), (grad_lse[:, :, 5], 1)):
        one.fill_(1e-20)
        grads = torch.autograd.grad((out, lse)[gradient], inputs, (grad_out, grad_lse)[gradient], retain_graph=True)
        assert grads[0][:, :, 5].isnan().all() and grads[1].isnan().all()
    # Nor does a gradient that is NaN.
    grads = torch.autograd.grad(out, inputs, torch.full_like(out, torch.nan))
    assert all(grad.isnan().all() for grad in grads)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("is_causal", [False, True])
def test_in_packed_documents(backend, is_causal):
    """A document's dead rows touch neither it nor the others, whose rows of a bucket may repeat its first token."""
    bounds, dead = (0, 9, 20), [0, 8, 9, 19]
    drawn = [torch.randn(1, 1, 20, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    grad = drawn[3].index_fill(2, torch.tensor(dead), 0.0)
    results = []
    for fill in (None, torch.nan):
        query = drawn[0].clone()
        if fill is not None:
            query[:, :, dead] = fill
        inputs = [x.detach().requires_grad_() for x in (query, *drawn[1:3])]
        out = dilated_attention(*inputs, (4, 8), (1, 2), is_causal=is_causal, cu_seqlens=bounds, backend=backend)
        results.append(torch.autograd.grad(out, inputs, grad))
    for want, got in zip(*results, strict=True):
        assert torch.equal(got, want) and want.any()
    assert not results[1][0][:, :, dead].any()


def test_the_usual_case_copies_nothing():
    """On a CPU rows that all have a gradient are passed on as they are."""
    grad, query, out = (torch.randn(2, 3, 4) for _ in range(3))
    lse = torch.tensor([[1.0, -torch.inf, 2.0], [0.0, 3.0, -torch.inf]])
    found = merge.rows_for_backward(grad, None, query, out, lse)
    assert found[0] is query and found[1] is out
    assert torch.equal(found[2], lse.masked_fill(lse.isinf(), 0.0))
    grad[0, 0] = 0.0
    found = merge.rows_for_backward(grad, None, query, out, lse)
    assert not found[0][0, 0].any() and torch.equal(found[0][1], query[1]) and found[2][0, 0] == torch.inf
    # A gradient of the lse is one too.
    assert merge.rows_for_backward(grad, torch.ones_like(lse), query, out, lse)[0] is query
