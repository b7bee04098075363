"""A norm and the projections that read it, by modules or, where kernels fit, as one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longnet.nn import Norm, fits, normed_linear, residual_normed_linear
from longnet.nn.norm import LayerNorm, RMSNorm
from longnet.runtime.autocast import autocast_dtype
from longnet.runtime.torch_internals import FakeTensor, is_call_changed, parameter_table


def project_normed(
    norm: nn.Module, linears: Sequence[Any], x: Tensor, key_padding_mask: Tensor | None = None, *, gelu: bool = False
) -> list[Tensor]:
    """``[linear(norm(x)) for linear in linears]``, of the exact GELU of x with ``gelu``.

    On a GPU in half precision it is :func:`longnet.nn.normed_linear`, which calls no module: not where a module is of another
    class (of an adapter, say), has hooks, or has parameters of another kind (quantised ones, say).

    Args:
        norm: see :func:`longnet.nn.norm.make_norm`.
        x: (B, N, C).
        key_padding_mask: what the norm is given with x.
    """
    dtype = _joined_dtype(norm, linears, x, gelu)
    if dtype is not None:
        return normed_linear(x, _norm(norm, gelu), _weights(linears), dtype)
    # Torch's kernels evaluate a bfloat16 or float16 GELU in float32 and round once, which is what casting around
    # it would give, without keeping a float32 copy of the widest activation for the backward pass.
    y = normalise(norm, F.gelu(x) if gelu else x, key_padding_mask)
    return [linear(y) for linear in linears]


def project_residual(
    norm: nn.Module, linears: Sequence[Any], x: Tensor, key_padding_mask: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """(x, :func:`project_normed`), where x is read again, as in a residual sum."""
    dtype = _joined_dtype(norm, linears, x, False)
    if dtype is not None:
        return residual_normed_linear(x, _norm(norm, False), _weights(linears), dtype)
    return x, project_normed(norm, linears, x, key_padding_mask)


def _joined_dtype(norm: nn.Module, linears: Sequence[Any], x: Tensor, gelu: bool) -> torch.dtype | None:
    """The dtype of what is projected if it can be one step; None if not."""
    is_norm = _is_plain(norm, LayerNorm) or (_is_plain(norm, RMSNorm) and norm.eps is not None)
    if not (is_norm and all(_is_plain(one, nn.Linear) for one in linears)):
        return None
    dtype: torch.dtype = autocast_dtype(x.device.type) or linears[0].weight.dtype
    readable = x.dtype == dtype or (x.dtype == torch.float32 and not gelu)
    return dtype if readable and fits(x.device, dtype, x.shape[-1]) else None


def _norm(norm: Any, gelu: bool) -> Norm:
    return Norm(norm.weight, norm.bias if isinstance(norm, LayerNorm) else None, norm.eps, gelu)


def _weights(linears: Sequence[Any]) -> list[tuple[Tensor, Tensor | None]]:
    return [(linear.weight, linear.bias) for linear in linears]


def normalise(norm: nn.Module, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
    """What projections read of ``norm(x)``; under autocast cast once, instead of by each of them."""
    y: Tensor = norm(x) if key_padding_mask is None else norm(x, key_padding_mask)
    dtype = autocast_dtype(x.device.type)
    return y if dtype is None or y.dtype == torch.float64 else y.to(dtype)


def is_as_its_class(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module does what that class does and no more."""
    return type(module) is kind and not is_call_changed(module)


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it is as its class, with parameters that are nothing but tensors."""
    return is_as_its_class(module, kind) and all(
        type(one) is nn.Parameter or _is_fake(one) for one in parameter_table(module).values() if one is not None
    )


def _is_fake(parameter: Any) -> bool:
    """Whether it is fake in a call that no compiler or export records: the call then does what one on real tensors does."""
    return type(parameter) is FakeTensor and not torch.compiler.is_compiling()
