"""A single token's query and key, rotated by a kernel where one fits."""

from __future__ import annotations

import struct
from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from longnet.runtime.triton_internals import Launch, Value
from longnet.runtime.triton_support import HAS_TRITON, interpreting, power_of_two

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fits(query: Tensor, key: Tensor) -> bool:
    """Whether :func:`rotate_token` takes these: one token on a GPU, without gradients, in no graph of the compiler."""
    return (
        query.shape[2] == 1
        and HAS_TRITON
        and (query.is_cuda or interpreting())
        and query.dtype in _DTYPES
        and key.dtype == query.dtype
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad))
    )


def rotate_token(
    query: Tensor,
    key: Tensor,
    position: Tensor,
    *,
    base: float,
    scale_base: float | None,
    centre: float,
    period: int | None,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Query (B, H, 1, D) and key (B, Hk, 1, D) of a token, rotated and scaled as by the tables of ``XPos``.

    Args:
        position: () int64, read on the device.
        base: of the rotation's frequencies.
        scale_base: None does not scale.
        centre, period: of the window that scales are relative to; a period of None has one window from position 0 on.
        offsets: (B,) int64 of the grid in each row, None where all are 0.
    """
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    outs = torch.empty_like(query), torch.empty_like(key)
    strides = tuple(x.stride()[:2] for x in (query, key, *outs))
    window = (base, scale_base, centre, period, offsets is not None)
    launch = _launch(tuple(query.shape), key.shape[1], strides, window, query.dtype, query.device)
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        launch.run((query, key, *outs, position, position if offsets is None else offsets))
    return outs


@lru_cache(maxsize=256)
def _launch(
    shape: tuple[int, ...],
    kv_heads: int,
    strides: tuple[tuple[int, ...], ...],
    window: tuple[float, float | None, float, int | None, bool],
    dtype: torch.dtype,
    device: torch.device,
) -> Launch:
    """For tensors of known shapes and strides. Types and devices have launches of their own."""
    from longnet.nn.position.kernels import rotate_token_kernel

    batch, heads, _, dim = shape
    base, scale_base, centre, period, by_row = window
    bits = (Value(_bits(number)) for number in (base, scale_base or 1.0, centre))
    options = {
        "D": dim, "PAIRS": power_of_two(dim // 2, 1), "SCALED": scale_base is not None, "REPEATS": period is not None,
        "BY_ROW": by_row, "num_warps": 1,
    }  # fmt: skip
    rest = (*strides, heads, kv_heads, *bits, Value(period or 1))
    return Launch(rotate_token_kernel, batch * (heads + kv_heads), (), rest, options)


def _bits(number: float) -> int:
    """A float64 as the integer of the same bits, which is above 0 for numbers of at least 0."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])
