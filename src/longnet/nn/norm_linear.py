"""A layer norm or RMS norm and the projections that read it, as one step of autograd: the norm's result is not saved.

A projection's gradient of its weight needs what it read. The kernel of the norm's backward pass has that in registers, and
writes it again. Gradients of biases are sums of columns, of which torch.compile makes slow kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from longnet.nn.norm_operators import column_sums, few_rows, is_few, norm_backward, norm_forward
from longnet.runtime.autocast import no_autocast


class Norm(NamedTuple):
    """A norm's parameters.

    Args:
        weight: (C,).
        bias: (C,) of a layer norm, None for RMS norm.
        eps: added to the variance, or to the mean square.
        gelu: whether it normalises the exact GELU of its input.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    gelu: bool = False


def normed_linear(
    x: Tensor, norm: Norm, linears: Sequence[tuple[Tensor, Tensor | None]], dtype: torch.dtype
) -> list[Tensor]:
    """``[norm(x) @ weight.T + bias for weight, bias in linears]``, where :func:`longnet.nn.fits`.

    Args:
        x: (..., C), float32 or of the dtype; with GELU of the dtype.
        linears: weights (D, C) and biases (D,), rounded to the dtype.
        dtype: bfloat16 or float16: what the norm is rounded to, which is computed in float32, and what the results have.
    """
    return _apply(x, norm, linears, dtype, False)


def residual_normed_linear(
    x: Tensor, norm: Norm, linears: Sequence[tuple[Tensor, Tensor | None]], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """(x, :func:`normed_linear` of x): where x is read again, as in a residual sum, its gradients are added up in one pass."""
    same, *outs = _apply(x, norm, linears, dtype, True)
    return same, outs


def _apply(
    x: Tensor, norm: Norm, linears: Sequence[tuple[Tensor, Tensor | None]], dtype: torch.dtype, residual: bool
) -> list[Tensor]:
    weights, biases = [weight for weight, _ in linears], [bias for _, bias in linears]
    with no_autocast(x):
        if torch.is_grad_enabled():
            return list(_NormedLinear.apply(x, *norm, dtype, residual, *weights, *biases))
        weights, biases = _rounded(weights, dtype), _rounded(biases, dtype)
        present = [bias for bias in biases if bias is not None]
        if is_few(x) and len(present) in (0, len(weights)):
            outs = few_rows(x, norm.weight, norm.bias, norm.eps, norm.gelu, weights, present)
        else:
            outs = _project(x, norm, weights, biases, dtype)
        return [x, *outs] if residual else outs


def _rounded(parameters: Sequence[Tensor | None], dtype: torch.dtype) -> list[Any]:
    return [None if one is None else one.to(dtype) for one in parameters]


def _project(x: Tensor, norm: Norm, weights: list[Tensor], biases: list[Any], dtype: torch.dtype) -> list[Tensor]:
    """:func:`normed_linear` of weights and biases that are rounded already."""
    if norm.gelu or not torch.compiler.is_compiling():
        y = norm_forward(x, *norm, dtype)
    else:
        # The compiler joins it to the sum before it.
        shape, weight = norm.weight.shape, norm.weight.float()
        if norm.bias is None:
            y = F.rms_norm(x.float(), shape, weight, norm.eps).to(dtype)
        else:
            y = F.layer_norm(x.float(), shape, weight, norm.bias.float(), norm.eps).to(dtype)
    return [F.linear(y, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


class _NormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        gelu: bool,
        dtype: torch.dtype,
        residual: bool,
        *parameters: Any,
    ) -> tuple[Tensor, ...]:
        count = len(parameters) // 2
        weights, biases = _rounded(parameters[:count], dtype), _rounded(parameters[count:], dtype)
        ctx.save_for_backward(x, weight, bias, *weights)
        ctx.norm, ctx.residual = (eps, gelu), residual
        ctx.types = [None if one is None else one.dtype for one in parameters]
        outs = _project(x, Norm(weight, bias, eps, gelu), weights, biases, dtype)
        # What is compiled may return no input; there a copy costs nothing.
        same = [x.clone() if torch.compiler.is_compiling() else x.view_as(x)] if residual else []
        return (*same, *outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *weights = ctx.saved_tensors
        beside, grads = (grads[0], grads[1:]) if ctx.residual else (None, grads)
        upstream = [grad @ one for grad, one in zip(grads, weights, strict=True)]
        grad_x, normed, sums = norm_backward(upstream, x, weight, bias, beside, *ctx.norm)
        kinds = ctx.types
        # torch.compile removes unused gradients.
        if not torch.compiler.is_compiling():
            needs_grad = ctx.needs_input_grad[-len(kinds) :]
            kinds = [kind if needed else None for kind, needed in zip(kinds, needs_grad, strict=True)]
        given, rows = [grad.flatten(0, -2) for grad in grads], normed.flatten(0, -2)
        pairs = list(zip(given, kinds[: len(given)], kinds[len(given) :], strict=True))
        of_weights = [None if kind is None else (grad.t() @ rows).to(kind) for grad, kind, _ in pairs]
        totals = iter(column_sums([grad for grad, _, kind in pairs if kind is not None]))
        of_biases = [None if kind is None else next(totals).to(kind) for _, _, kind in pairs]
        of_bias = None if bias is None else sums[1].to(bias.dtype)
        return grad_x, sums[0].to(weight.dtype), of_bias, None, None, None, None, *of_weights, *of_biases
