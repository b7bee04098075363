"""Mixing in a branch that gives nothing but a denominator, in one pass over the output."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from longnet.runtime.triton_internals import Launch
from longnet.runtime.triton_support import HAS_TRITON, power_of_two

# Tokens of a program.
_ROWS = 64


def rescale_(out: Tensor, lse: Tensor, other: Tensor) -> Tensor:
    """Mix a branch whose out is 0 into a result: ``out *= exp(lse - merged)``, in place; see :mod:`longnet.attention.merge`.

    Args:
        out: (B, H, N, D).
        lse: (B, H, N) its log-denominator, float32, or float64 for float64.
        other: (H, N) the branch's, contiguous, of the same type; -inf where it has none.

    Returns:
        merged: (B, H, N), ``log(exp(lse) + exp(other))``.
    """
    if out.is_cuda and HAS_TRITON and lse.dtype == torch.float32 and out.stride(-1) == 1 and out.numel():
        with torch.cuda.device_of(out):
            return _rescale(out, lse, other)
    # exp(lse - merged) in one step. The arithmetic is that of the lse, the result stays in out's own dtype.
    share = torch.sub(lse, other).sigmoid_()
    # A row that neither has reached: -inf on both sides.
    share.nan_to_num_(0.0)
    out.mul_(share.unsqueeze(-1))
    return torch.logaddexp(lse, other)


def _rescale(out: Tensor, lse: Tensor, other: Tensor) -> Tensor:
    """:func:`rescale_` by the kernel."""
    merged = torch.empty_like(lse, memory_format=torch.contiguous_format)
    strides = (out.stride()[:3], lse.stride())
    _launch(tuple(out.shape), strides, out.dtype, out.device).run((out, lse, other, merged), ())
    return merged


# One entry per combination of shape and strides.
@lru_cache(maxsize=512)
def _launch(
    shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], dtype: torch.dtype, device: torch.device
) -> Launch:
    """The launch for tensors of such shapes and strides. Types and devices have launches of their own."""
    from longnet.nn.kernels import rescale_kernel

    batch, heads, length, channels = shape
    tiles = -(-length // _ROWS)
    options = {"CHANNELS": channels, "D": power_of_two(channels), "ROWS": _ROWS}
    return Launch(rescale_kernel, tiles * heads * batch, (), (length, tiles, heads, *strides), options)
