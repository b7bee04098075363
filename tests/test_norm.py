"""Norms: each against its formula in float64, batch norm against padding."""

from __future__ import annotations

import ast
import inspect

import pytest
import torch

import longnet.nn.norm
from longnet.nn.norm import BatchNorm, PartialNorm, make_norm

B, N, C = 3, 7, 5


def _x(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(B, N, C, generator=generator, dtype=torch.float64) * 3 + 2).to(dtype)


def _mask() -> torch.Tensor:
    mask = torch.zeros(B, N, dtype=torch.bool)
    mask[0, 5:] = True
    mask[1, 0] = True
    return mask


def _norm(kind: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    norm = make_norm(kind, C, eps=1e-3, dtype=dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, C))
        if hasattr(norm, "bias"):
            norm.bias.copy_(torch.linspace(-1, 1, C))
    return norm


def test_layer_and_rms_are_their_formulas() -> None:
    x = _x()
    weight, bias = torch.linspace(0.5, 1.5, C).double(), torch.linspace(-1, 1, C).double()
    centred = x - x.mean(-1, keepdim=True)
    layer = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight + bias
    rms = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    torch.testing.assert_close(_norm("layer")(x), layer, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(_norm("rms")(x), rms, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_per_token_norms_ignore_the_mask(kind: str) -> None:
    norm = _norm(kind)
    assert torch.equal(norm(_x(), _mask()), norm(_x()))


def test_batch_norm_without_padding_is_torchs() -> None:
    norm, theirs = _norm("batch"), torch.nn.BatchNorm1d(C, eps=1e-3, dtype=torch.float64)
    theirs.weight.data, theirs.bias.data = norm.weight.data.clone(), norm.bias.data.clone()
    x, y = _x().requires_grad_(), _x().requires_grad_()
    out, expected = norm(x), theirs(y.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    out.square().mul(torch.arange(C)).sum().backward()
    expected.square().mul(torch.arange(C)).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(norm.running_mean, theirs.running_mean)
    torch.testing.assert_close(norm.running_var, theirs.running_var)
    norm.eval(), theirs.eval()
    torch.testing.assert_close(norm(_x()), theirs(_x().transpose(1, 2)).transpose(1, 2), rtol=1e-12, atol=1e-12)


def test_batch_norm_leaves_padding_out_even_nan() -> None:
    """Statistics, results and gradients of a padded batch are those of its valid tokens alone."""
    mask, norm, alone = _mask(), _norm("batch"), _norm("batch")
    x = _x()
    x[mask] = torch.nan
    x.requires_grad_()
    valid = _x()[~mask][None].requires_grad_()
    out, expected = norm(x, mask), alone(valid)
    torch.testing.assert_close(out[~mask], expected[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(out[mask], torch.zeros_like(out[mask]))
    torch.testing.assert_close(norm.running_mean, alone.running_mean)
    torch.testing.assert_close(norm.running_var, alone.running_var)
    out.pow(3).sum().backward()
    expected.pow(3).sum().backward()
    torch.testing.assert_close(x.grad[~mask], valid.grad[0], rtol=1e-10, atol=1e-10)
    assert torch.equal(x.grad[mask], torch.zeros_like(x.grad[mask]))
    torch.testing.assert_close(norm.weight.grad, alone.weight.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(norm.bias.grad, alone.bias.grad, rtol=1e-10, atol=1e-10)


def test_batch_norm_eval_uses_running_statistics_and_keeps_them() -> None:
    norm = _norm("batch")
    norm(_x())
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    norm.eval()
    x = _x() + 100
    expected = (x - mean) / (var + 1e-3).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x, torch.zeros(B, N, dtype=torch.bool)), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(norm.running_mean, mean) and torch.equal(norm.running_var, var)


def test_batch_norm_of_nothing_but_padding_keeps_its_statistics() -> None:
    norm = _norm("batch")
    x = _x().requires_grad_()
    out = norm(x, torch.ones(B, N, dtype=torch.bool))
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out)) and torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(norm.running_mean, torch.zeros(C).double())
    assert torch.equal(norm.running_var, torch.ones(C).double())
    assert norm(_x()[:0]).shape == (0, N, C)
    assert torch.equal(norm.running_var, torch.ones(C).double())


def test_batch_norm_of_one_token_is_refused_in_training_only() -> None:
    norm = _norm("batch")
    with pytest.raises(ValueError, match="single token"):
        norm(_x()[:1, :1])
    assert norm.eval()(_x()[:1, :1]).isfinite().all()


@pytest.mark.parametrize("kind", ["layer", "rms", "batch"])
def test_low_precision_rounds_only_the_result(kind: str) -> None:
    x = _x(torch.bfloat16)
    out = _norm(kind, torch.bfloat16)(x, _mask())
    assert out.dtype == torch.bfloat16
    expected = _norm(kind)(x.double(), _mask())
    # The weights of _norm are rounded to bfloat16 as well, hence two roundings of 2 ** -9 and the sum with the bias.
    torch.testing.assert_close(out.double(), expected, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("kind", ["layer", "rms", "batch"])
def test_autocast_keeps_statistics_and_parameters_in_float32(kind: str) -> None:
    norm, x = _norm(kind, torch.float32), _x(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = norm(x, _mask())
    assert out.dtype == torch.bfloat16
    again = _norm(kind, torch.float32)(x.float(), _mask())
    assert torch.equal(out, again.to(torch.bfloat16))
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in norm.parameters())


def test_running_statistics_stay_float32_in_a_bfloat16_norm() -> None:
    norm = make_norm("batch", C, dtype=torch.bfloat16)
    assert isinstance(norm, BatchNorm)
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    assert make_norm("batch", C, dtype=torch.float64).running_mean.dtype == torch.float64
    norm.to(torch.bfloat16)
    assert norm(_x(torch.bfloat16)).isfinite().all() and norm.running_mean.dtype == torch.bfloat16


def test_bad_arguments_teach() -> None:
    with pytest.raises(ValueError, match=r"kind='group'.*layer.*rms.*batch"):
        make_norm("group", C)
    with pytest.raises(ValueError, match="dim=0"):
        make_norm("layer", 0)


def test_norm_imports_nothing_of_longnet() -> None:
    """The attention imports the norm, so the norm may not lead back to it."""
    names: list[str] = []
    for node in ast.walk(ast.parse(inspect.getsource(longnet.nn.norm))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or ".")
    assert {name.partition(".")[0] for name in names} == {"__future__", "typing", "torch"}


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_channels_that_are_left_are_normalised_as_among_all(kind: str) -> None:
    whole, x = _norm(kind), _x()
    x[..., 3:] = 0.0
    part = PartialNorm(kind, 3, C, eps=1e-3, dtype=torch.float64)
    part.load_state_dict({name: weight[:3] for name, weight in whole.state_dict().items()})
    there, absent = part(x[..., :3])
    expected = whole(x)
    torch.testing.assert_close(there, expected[..., :3], rtol=1e-12, atol=1e-12)
    rest = absent * whole.weight[3:] + (whole.bias[3:] if kind == "layer" else 0.0)
    torch.testing.assert_close(rest, expected[..., 3:], rtol=1e-12, atol=1e-12)


def test_what_cannot_leave_channels_out() -> None:
    with pytest.raises(ValueError, match="kind='batch' cannot leave channels out"):
        PartialNorm("batch", 3, C)
    with pytest.raises(ValueError, match="dim=5 of width=5"):
        PartialNorm("layer", 5, 5)
