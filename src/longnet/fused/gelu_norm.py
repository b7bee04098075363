"""``layer_norm(gelu(x))``: the widest activation of a layer read once and written once, forward and backward.

What torch.compile makes of it reads a row several times and evaluates the error function each time. Here a row stays in
registers, and only x and two numbers a row are kept for the backward pass.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from longnet.backends.operators import define, no_second_derivative
from longnet.backends.tma import Launch
from longnet.backends.triton_flash import HAS_TRITON

DTYPES = (torch.bfloat16, torch.float16)

# A row is up to so many parts of so many channels.
_MOST_PARTS = 4
_WIDTHS = (256, 512, 1024, 2048, 4096)
_LARGEST_ROW = 8192

# The fastest of a few on one H200: programs of a multiprocessor, each of so many warps.
_PROGRAMS, _WARPS = 8, 4
_PROGRAMS_BACKWARD, _WARPS_BACKWARD = 2, 8


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`gelu_norm` takes them: bfloat16 or float16 on a GPU, C from 256 to 8192, 1 to 4 times a power of two."""
    kind = x.is_cuda and HAS_TRITON and x.dtype in DTYPES and weight.dtype != torch.float64
    return kind and _width(x.shape[-1]) is not None


def gelu_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm over the last axis of the exact GELU (arXiv 1606.08415) of x (..., C), where :func:`fits`.

    Arithmetic is float32, the result has x's dtype. The normal distribution's function is right to 7.5e-8.

    Args:
        weight, bias: (C,), float32 or of half precision.
        eps: added to the variance.
    """
    normed: Tensor = _forward(x, weight, bias, eps)[0]
    return normed


def _width(channels: int) -> int | None:
    """Channels of a part of a row, None where no width fits."""
    if channels > _LARGEST_ROW:
        return None
    return next((width for width in _WIDTHS if channels % width == 0 and channels // width <= _MOST_PARTS), None)


def _run(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    out, statistics = torch.empty_like(x), x.new_empty(*x.shape[:-1], 2, dtype=torch.float32)
    if x.numel():
        with torch.cuda.device_of(x):
            launch = _launch("forward", x.numel() // x.shape[-1], x.shape[-1], eps, x.dtype, weight.dtype, x.device)
            launch.run((x, weight.contiguous(), bias.contiguous(), out, statistics), ())
    return out, statistics


def _run_backward(grad: Tensor, x: Tensor, weight: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad, x = grad.contiguous(), x.contiguous()
    grad_x, channels = torch.empty_like(x), x.shape[-1]
    if not x.numel():
        return grad_x, torch.zeros_like(weight), torch.zeros_like(weight)
    with torch.cuda.device_of(x):
        launch = _launch("backward", x.numel() // channels, channels, 0.0, x.dtype, weight.dtype, x.device)
        # Of each program what its rows give to the gradients of weight and bias.
        sums = x.new_empty(2, launch.programs, channels, dtype=torch.float32)
        launch.run((grad, x, weight.contiguous(), statistics, grad_x, sums), ())
    grad_weight, grad_bias = sums.sum(1).to(weight.dtype).unbind()
    return grad_x, grad_weight, grad_bias.clone()


# For so many different numbers of rows.
@lru_cache(maxsize=512)
def _launch(
    kind: str, rows: int, channels: int, eps: float, dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device
) -> Launch:
    """Launches of one number of rows. Types and devices have launches of their own."""
    from longnet.fused import kernels

    width = _width(channels)
    assert width is not None
    each, warps = (_PROGRAMS, _WARPS) if kind == "forward" else (_PROGRAMS_BACKWARD, _WARPS_BACKWARD)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    options = {"PARTS": channels // width, "WIDTH": width, "num_warps": warps}
    if kind == "forward":
        return Launch(kernels.gelu_norm_kernel, min(rows, each * processors), (), (rows, eps), options)
    return Launch(kernels.gelu_norm_backward_kernel, min(rows, each * processors), (), (rows,), options)


def _fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    contiguous = torch.empty_like(x, memory_format=torch.contiguous_format)
    return contiguous, x.new_empty(*x.shape[:-1], 2, dtype=torch.float32)


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    contiguous = torch.empty_like(x, memory_format=torch.contiguous_format)
    return contiguous, torch.empty_like(weight), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    x, weight, statistics = ctx.saved_tensors
    return (*_backward(grad, x, weight, statistics), None)


_forward = define("gelu_norm", _run, _fake)
_backward = define("gelu_norm_backward", _run_backward, _fake_backward)
torch.library.register_autograd("longnet::gelu_norm", _differentiate, setup_context=_keep)
torch.library.register_autograd("longnet::gelu_norm_backward", no_second_derivative("gelu_norm_backward"))
