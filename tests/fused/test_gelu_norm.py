"""GELU and its norm in one kernel, against float64: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longnet.fused import fits, gelu_norm
from longnet.models import LongNetConfig
from longnet.models.layers import FeedForward

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of a result that is rounded once, by dtype.
ROUNDING = {torch.float16: 5e-4, torch.bfloat16: 4e-3}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """(result and gradients of the kernels, those of float64)."""
    inputs = [one.to(DEVICE).requires_grad_() for one in (x, weight, bias)]
    out = gelu_norm(*inputs, 1e-5)
    found = [out, *torch.autograd.grad(out, inputs, grad.to(out))]
    exact = [one.detach().double().cpu().requires_grad_() for one in inputs]
    expected = F.layer_norm(F.gelu(exact[0]), x.shape[-1:], *exact[1:], 1e-5)
    upstream = grad.to(x.dtype).double()
    return [one.double().cpu() for one in found], [expected, *torch.autograd.grad(expected, exact, upstream)]


@settings(max_examples=30)
@given(
    channels=st.sampled_from([256, 512, 768, 1024, 1536]),
    shape=st.sampled_from([(1,), (3,), (2, 5), (1, 1, 4)]),
    dtype=st.sampled_from(list(ROUNDING)),
    weights=st.sampled_from([torch.float32, torch.bfloat16]),
    spread=st.sampled_from([0.3, 3.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_results_and_gradients(channels, shape, dtype, weights, spread, seed):
    x = (draw(*shape, channels, seed=seed) * spread).to(dtype)
    weight, bias = draw(channels, seed=seed + 1).to(weights), draw(channels, seed=seed + 2).to(weights)
    found, expected = both(x, weight, bias, draw(*shape, channels, seed=seed + 3))
    allowed = (ROUNDING[dtype], ROUNDING[dtype], *[1e-5 if weights == torch.float32 else 4e-3] * 2)
    for got, want, most in zip(found, expected, allowed, strict=True):
        assert (got - want).norm() <= most * want.norm()


def test_far_from_zero_and_at_it():
    # Tails of the normal distribution, zeros of both signs, and the largest float16.
    x = torch.tensor([0.0, -0.0, 1e-7, -1e-7, 0.5, -0.5, 6.0, -6.0, 300.0, -300.0, 65504.0, -65504.0] * 64)[None]
    for half in (x.half(), x[:, :256].half() / 1000):
        channels = half.shape[-1]
        found, expected = both(half, torch.ones(channels), torch.zeros(channels), draw(1, channels))
        for got, want in zip(found, expected, strict=True):
            assert got.isfinite().all() and (got - want).norm() <= 5e-4 * want.norm()


def test_strides_no_rows_and_frozen_weights():
    x, weight, bias = draw(4, 256, 3).half().to(DEVICE), draw(256).float().to(DEVICE), draw(256).float().to(DEVICE)
    across = x.transpose(1, 2)
    assert torch.equal(gelu_norm(across, weight, bias, 1e-5), gelu_norm(across.contiguous(), weight, bias, 1e-5))
    none = x.new_empty(0, 256).requires_grad_()
    out = gelu_norm(none, weight, bias, 1e-5)
    assert out.shape == (0, 256) and torch.autograd.grad(out.sum(), none)[0].shape == (0, 256)
    rows = across[0].detach().requires_grad_()
    gelu_norm(rows, weight, bias, 1e-5).sum().backward()
    assert rows.grad is not None and rows.grad.isfinite().all()


def test_no_second_derivative():
    x = draw(2, 256).half().to(DEVICE).requires_grad_()
    weight, bias = torch.ones(256, device=DEVICE), torch.zeros(256, device=DEVICE)
    (grad,) = torch.autograd.grad(gelu_norm(x, weight, bias, 1e-5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_what_fits():
    if DEVICE == "cpu":
        assert not fits(draw(2, 3072).half(), torch.ones(3072))
        return
    weight = torch.ones(1, device=DEVICE)
    assert all(
        fits(torch.empty(2, c, device=DEVICE, dtype=torch.half), weight) for c in (256, 768, 3072, 4096, 6144, 8192)
    )
    assert not any(fits(torch.empty(2, c, device=DEVICE, dtype=torch.half), weight) for c in (64, 400, 5120, 16384))
    assert not fits(torch.empty(2, 3072, device=DEVICE), weight)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_feed_forward_takes_it(compiled):
    torch.manual_seed(0)
    config = LongNetConfig(vocab_size=1, dim=256, heads=4, layers=1, segment_lengths=64, dilation_rates=1)
    module = FeedForward(config, device=DEVICE)
    x = draw(2, 50, 256).float().to(DEVICE).requires_grad_()
    call = torch.compile(module) if compiled else module
    with torch.autocast("cuda", torch.float16):
        out = call(x)
    grads = torch.autograd.grad(out.float().square().sum(), [x, *module.parameters()])
    exact = module.double()
    wide = x.detach().double().requires_grad_()
    expected = exact(wide)
    wanted = torch.autograd.grad(expected.square().sum(), [wide, *exact.parameters()])
    for got, want in zip((out, *grads), (expected, *wanted), strict=True):
        assert (got.double() - want).norm() <= 5e-3 * want.norm()
