"""Some heads by number give exactly what they give among all: on every backend, forward and backward.

The reference is the dense float64 oracle on all heads; what it says of the others is thrown away.
"""

from __future__ import annotations

import importlib.util
import logging

import interpreted
import pytest
import torch
from hypothesis import given, settings
from patterns import KeptHeads, Problem, backward, kept_heads, relative_error
from torch import Tensor

from longnet import dilated_attention
from longnet.attention.backends.triton import backend as triton_flash
from longnet.attention.call import AttentionSpec
from longnet.attention.functional import pattern_attention
from longnet.geometry import Pattern

pytestmark = pytest.mark.filterwarnings("ignore:segment_lengths=.*to no head")


def check(kept: KeptHeads, backend: str, tolerance: float = 1e-10, grad_tolerance: float = 1e-10) -> None:
    inputs, one = kept.tensors(), kept.problem
    out, lse = pattern_attention(
        *inputs, kept.pattern, is_causal=one.is_causal, key_padding_mask=one.mask(), return_lse=True, backend=backend
    )
    expected, expected_lse, grads = kept.expected()
    finite = expected_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    assert relative_error(out, expected) < tolerance
    assert relative_error(lse[finite], expected_lse[finite]) < tolerance
    for got, want in zip(backward(out, lse, inputs, kept.upstream()), grads, strict=True):
        assert relative_error(got, want) < grad_tolerance


@pytest.mark.parametrize("backend", ["cpu_flash", "portable"])
@given(kept=kept_heads())
@settings(max_examples=150, deadline=None)
def test_kept_heads_are_those_of_the_full_computation(backend: str, kept: KeptHeads) -> None:
    check(kept, backend)


SOME = [
    KeptHeads(Problem(2, 5, 1, 35, 4, ((8, 1), (16, 3), (33, 4)), True, "interleaved", None, True, 1), (0, 1, 3, 4)),
    KeptHeads(Problem(1, 6, 1, 41, 5, ((8, 2), (20, 5)), False, "blocked", 0.3, False, 2), (1, 3, 4)),
    KeptHeads(Problem(1, 3, 2, 37, 8, ((7, 2), (30, 4)), True, "interleaved", 0.2, True, 3), (1, 2)),
]


@pytest.mark.skipif(
    torch.cuda.is_available() or importlib.util.find_spec("triton") is None,
    reason="needs triton, and no GPU: with one, kernels are compiled",
)
@pytest.mark.parametrize("kept", SOME)
def test_kernels_of_triton_compute_them_among_all_heads(
    kept: KeptHeads, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(triton_flash, "blocks_for", lambda *_: triton_flash.Blocks(16, 16, 4, 1))
    monkeypatch.setattr(triton_flash, "LEAST_ROWS", 1)
    interpreted.hasten()
    kept = KeptHeads(Problem(**{**vars(kept.problem), "dtype": torch.float32}), kept.kv_heads)
    with caplog.at_level(logging.DEBUG, logger="longnet"):
        check(kept, "triton", 1e-5, 1e-4)
    assert f"heads {kept.numbers} are computed among all {kept.problem.heads}" in caplog.text


@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_a_bias_belongs_to_the_heads_that_are_kept(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton" and (torch.cuda.is_available() or importlib.util.find_spec("triton") is None):
        pytest.skip("needs triton, and no GPU: with one, kernels are compiled")
    monkeypatch.setattr(triton_flash, "blocks_for", lambda *_: triton_flash.Blocks(16, 16, 4, 1))
    interpreted.hasten()
    torch.manual_seed(0)
    numbers, pattern = (0, 2, 3, 5), ((8, 16), (2, 3))
    q, k, v = (torch.randn(1, 6, 20, 8) for _ in range(3))
    bias = torch.randn(6, 39)
    whole = [x.clone().requires_grad_() for x in (q, k, v, bias)]
    part = [x[:, numbers].clone().requires_grad_() for x in (q, k, v)] + [bias[list(numbers)].clone().requires_grad_()]
    settings = {"is_causal": True, "backend": backend}
    out = pattern_attention(*whole[:3], Pattern.parse(*pattern), distance_bias=whole[3], **settings)[:, numbers]
    kept = Pattern.parse(*pattern, "interleaved", numbers, 6)
    got = pattern_attention(*part[:3], kept, distance_bias=part[3], **settings)
    torch.testing.assert_close(got, out, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(out)
    *rows, by_distance = torch.autograd.grad(out, whole, grad)
    for ours, want in zip(
        torch.autograd.grad(got, part, grad), (*(x[:, numbers] for x in rows), by_distance[list(numbers)]), strict=True
    ):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)


def test_numbers_of_all_heads_change_nothing() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 5, 30, 4) for _ in range(3))
    pattern = Pattern.parse((8, 16), (1, 3), "blocked", range(5), 5)
    expected = dilated_attention(q, k, v, (8, 16), (1, 3), head_offsets="blocked")
    assert torch.equal(pattern_attention(q, k, v, pattern), expected)


def test_compiles_to_one_graph_with_gradients() -> None:
    pattern = Pattern.parse((8, 16), (1, 3), "interleaved", (1, 2, 5), 6)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return pattern_attention(q * 2, k, v, pattern, is_causal=True).square().sum()

    torch.manual_seed(0)
    inputs = [torch.randn(1, 3, 20, 4, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*inputs), inputs)
    for got, want in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_another_number_of_heads_is_refused() -> None:
    pattern = Pattern.parse((8,), (2,), "interleaved", (0, 2), 4)
    x = torch.randn(1, 3, 10, 4)
    with pytest.raises(ValueError, match=r"query has 3 heads: expected those of head_numbers=\(0, 2\)"):
        pattern_attention(x, x, x, pattern)


@pytest.mark.parametrize("name", ["cpu_flash", "portable"])
def test_opcheck(name: str) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, 3, 20, 4, requires_grad=True) for _ in range(3)]
    spec = AttentionSpec(Pattern.parse([8, 16], [1, 3], "interleaved", [1, 2, 5], 6), True, 0.5)
    torch.library.opcheck(getattr(torch.ops.longnet, name).default, (*inputs, None, None, None, *spec.encode()))
