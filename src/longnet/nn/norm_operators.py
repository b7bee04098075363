"""Layer norm and RMS norm, alone or of GELU, in one pass over memory each way. A ``bias`` of None means RMS norm.

What torch.compile makes of ``layer_norm(gelu(x))`` reads a row several times and evaluates the error function each time, and of
the backward pass of any layer norm two kernels, one along rows and one along channels. Here a row stays in registers. The
backward pass needs nothing but x: mean and deviation come from it again, and so does the norm itself, which whoever reads it
need not keep (:mod:`longnet.nn.norm_linear`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from longnet.runtime.operators import define
from longnet.runtime.triton_internals import Launch, Value
from longnet.runtime.triton_support import HAS_TRITON, power_of_two

DTYPES = (torch.bfloat16, torch.float16)

# The most parts of a row, and the channels of each.
_MOST_PARTS = 4
_WIDTHS = (256, 512, 1024, 2048, 4096)
_LARGEST_ROW = 8192
# The most rows of :func:`few_rows`, which takes one after the other; more are left to the library's matrix product.
_FEW = 4


def fits(device: torch.device, dtype: torch.dtype, channels: int) -> bool:
    """Whether there are kernels: bfloat16 or float16 on a GPU, channels from 256 to 8192, 1 to 4 times a power of two."""
    return device.type == "cuda" and HAS_TRITON and dtype in DTYPES and _width(channels) is not None


def _width(channels: int) -> int | None:
    """Channels of a part of a row, None where no width fits."""
    if channels > _LARGEST_ROW:
        return None
    return next((width for width in _WIDTHS if channels % width == 0 and channels // width <= _MOST_PARTS), None)


def norm_forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, gelu: bool, dtype: torch.dtype) -> Tensor:
    """A norm over the last axis of x (..., C), or of its exact GELU (arXiv 1606.08415), where :func:`fits`; no gradient.

    Arithmetic is float32. The normal distribution's function is right to 7.5e-8.

    Args:
        x: float32 or of half precision.
        weight, bias: (C,), float32 or of half precision.
        eps: added to the variance, or to the mean square.
        dtype: of the result.
    """
    normed: Tensor = _forward(x, weight, bias, eps, gelu, dtype)
    return normed


def is_few(x: Tensor) -> bool:
    """Whether :func:`few_rows` takes as many rows as x (..., C) has."""
    return 0 < x.numel() <= _FEW * x.shape[-1]


def norm_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    beside: Tensor | None,
    eps: float,
    gelu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of x; the norm again; gradients of weight and bias, float32, (2, C), or (1, C)) of a norm of x, or of its GELU.

    Args:
        grads: several of x's shape, all of one dtype, whose sum is the gradient of the norm. The norm has their dtype.
        x: (..., C), of any dtype.
        beside: what x's gradient is besides, of x's shape and dtype; None for nothing.
    """
    grads_of: tuple[Tensor, Tensor, Tensor] = _backward(grads, x, weight, bias, beside, eps, gelu)
    return grads_of


def column_sums(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sum of each of several tensors (..., C) over all but its last axis: float32, (C,)."""
    if tensors and all(one.shape == tensors[0].shape for one in tensors):
        return list(_sums(tensors).unbind())
    return [_sums([one])[0] for one in tensors]


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _dtype(x: Tensor | None) -> torch.dtype | None:
    return None if x is None else x.dtype


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, gelu: bool, dtype: torch.dtype) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    if x.numel():
        launch = _launch("norm_forward", x.shape, (eps, gelu), (x.dtype, weight.dtype, _dtype(bias), dtype), x.device)
        with torch.cuda.device_of(x):
            launch.run((x, weight.contiguous(), _contiguous(bias), out), ())
    return out


def _run_few(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    gelu: bool,
    matrices: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> list[Tensor]:
    """``norm(x) @ matrix.T + bias`` for each of the matrices (D, C), of their dtype: one launch for a few rows; no gradient.

    Args:
        x, weight, bias, eps, gelu: as of :func:`norm_forward`.
        biases: (D,), as many as matrices, or none.
    """
    x, matrices = x.contiguous(), tuple(matrix.contiguous() for matrix in matrices)
    outs = _fake_few(x, weight, bias, eps, gelu, matrices, biases)
    tensors = (
        x,
        weight.contiguous(),
        _contiguous(bias),
        matrices,
        tuple(one.contiguous() for one in biases),
        tuple(outs),
    )
    types = (x.dtype, weight.dtype, _dtype(bias), *[one.dtype for one in (*matrices, *biases)])
    columns = tuple(len(matrix) for matrix in matrices)
    launch = _few_launch(x.numel() // x.shape[-1], x.shape[-1], columns, eps, gelu, types, x.device)
    with torch.cuda.device_of(x):
        launch.run(tensors, ())
    return outs


@lru_cache(maxsize=512)
def _few_launch(
    rows: int,
    channels: int,
    columns: tuple[int, ...],
    eps: float,
    gelu: bool,
    types: tuple[torch.dtype | None, ...],
    device: torch.device,
) -> Launch:
    """For x (rows, channels). Types and devices have launches of their own."""
    from longnet.nn import kernels

    width = _width(channels)
    assert width is not None
    # Few columns, so that there are programs for all multiprocessors, each with all that it reads in flight.
    each = 4 if sum(columns) <= 1024 else 8
    options = {
        "GELU": gelu, "PARTS": channels // width, "WIDTH": width, "COLUMNS": each, "num_warps": 4 if channels < 2048 else 8,
    }  # fmt: skip
    programs = sum(-(-one // each) for one in columns)
    return Launch(kernels.few_rows_kernel, programs, (), (Value(rows), eps, tuple(map(Value, columns))), options)


def _run_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    beside: Tensor | None,
    eps: float,
    gelu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x, grads = x.contiguous(), tuple(grad.contiguous() for grad in grads)
    grad_x, normed = torch.empty_like(x), torch.empty_like(grads[0])
    if not x.numel():
        return grad_x, normed, x.new_zeros(1 + (bias is not None), x.shape[-1], dtype=torch.float32)
    types = (x.dtype, weight.dtype, _dtype(bias), _dtype(beside), *[grad.dtype for grad in grads])
    launch = _launch("norm_backward", x.shape, (eps, gelu), types, x.device)
    with torch.cuda.device_of(x):
        # What the rows of each program add to the gradients of weight and bias.
        sums = x.new_empty(1 + (bias is not None), launch.programs, x.shape[-1], dtype=torch.float32)
        launch.run((grads, x, weight.contiguous(), _contiguous(bias), _contiguous(beside), grad_x, normed, sums), ())
    return grad_x, normed, sums.sum(1)


def _run_sums(tensors: Sequence[Tensor]) -> Tensor:
    tensors = tuple(one.contiguous() for one in tensors)
    first, count = tensors[0], len(tensors)
    if _width(first.shape[-1]) is None or not first.numel():
        return torch.stack([one.flatten(0, -2).sum(0, dtype=torch.float32) for one in tensors])
    launch = _launch("column_sums", first.shape, (), tuple(one.dtype for one in tensors), first.device)
    with torch.cuda.device_of(first):
        sums = first.new_empty(count, launch.programs // count, first.shape[-1], dtype=torch.float32)
        launch.run((tensors, sums), ())
    return sums.sum(1)


# One entry per number of rows.
@lru_cache(maxsize=512)
def _launch(
    kind: str,
    shape: tuple[int, ...],
    rest: tuple[Any, ...],
    types: tuple[torch.dtype | None, ...],
    device: torch.device,
) -> Launch:
    """The launch for a shape (..., C). Types and devices have launches of their own."""
    from longnet.nn import kernels

    width, rows = _width(shape[-1]), math.prod(shape[:-1])
    assert width is not None
    each, warps, tall = _plan(kind, shape[-1], width, *rest[1:])
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    programs = min(-(-rows // tall), each * processors)
    options = {"PARTS": shape[-1] // width, "WIDTH": width, "num_warps": warps}
    if kind == "column_sums":
        return Launch(kernels.column_sums_kernel, programs * len(types), (), (Value(rows),), options | {"ROWS": tall})
    kernel = kernels.norm_forward_kernel if kind == "norm_forward" else kernels.norm_backward_kernel
    return Launch(kernel, programs, (), (Value(rows), *rest), options)


def _plan(kind: str, channels: int, width: int, gelu: bool = False) -> tuple[int, int, int]:
    """(programs of a multiprocessor, warps of each, rows that it takes at once): the fastest of a few on one H200."""
    if kind == "norm_forward":
        warps = min(4, power_of_two(-(-channels // 768), least=1))
        return 32 // warps, warps, 1
    if kind == "column_sums":
        return 2 if width < 1024 else 4, 4, max(1, 4096 // width)
    # GELU has more to hold of each channel.
    busy, each = (16, 384) if gelu else (12, 768)
    warps = min(busy, power_of_two(-(-channels // each), least=1))
    return busy // warps, warps, 1


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, gelu: bool, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _fake_few(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    gelu: bool,
    matrices: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> list[Tensor]:
    return [matrix.new_empty((*x.shape[:-1], len(matrix))) for matrix in matrices]


def _fake_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    beside: Tensor | None,
    eps: float,
    gelu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, normed = (torch.empty_like(one, memory_format=torch.contiguous_format) for one in (x, grads[0]))
    return grad_x, normed, x.new_empty(1 + (bias is not None), x.shape[-1], dtype=torch.float32)


def _fake_sums(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].new_empty(len(tensors), tensors[0].shape[-1], dtype=torch.float32)


_forward = define("norm_forward", _run, _fake)
few_rows: Callable[..., list[Tensor]] = define("few_rows", _run_few, _fake_few)
_backward = define("norm_backward", _run_backward, _fake_backward)
_sums = define("column_sums", _run_sums, _fake_sums)
