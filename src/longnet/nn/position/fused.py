"""Queries and keys rotated by a kernel, where one fits.

What torch.compile makes of tables and of a rotation computes the angles anew for every head and channel, in float64.
"""

from __future__ import annotations

import struct
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longnet.runtime.operators import caller_of, define
from longnet.runtime.torch_internals import has_tangents
from longnet.runtime.tracing import is_traced
from longnet.runtime.triton_internals import Launch, Value
from longnet.runtime.triton_support import HAS_TRITON, power_of_two

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tokens of a program, where there are several; it rotates all their heads by the same angles.
_TOKENS = 16


class Scales(NamedTuple):
    """What ``XPos`` scales by.

    Args:
        base: tokens over which the decay falls by ``zeta``.
        centre, period: of the window that scales are relative to; a period of None has one window from position 0 on.
    """

    base: float
    centre: float
    period: int | None


def _is_on_gpu(x: Tensor) -> bool:
    """Tests replace it, to run the kernel in Triton's interpreter. Elsewhere the interpreter would slow every model down."""
    return x.is_cuda


def fits(query: Tensor, key: Tensor) -> bool:
    """Whether :func:`rotate_both` takes these: on a GPU, in float32 or half precision, and seen by no transform."""
    return (
        HAS_TRITON
        and _is_on_gpu(query)
        and query.dtype in _DTYPES
        and key.dtype == query.dtype
        and type(query) is type(key) is Tensor
        and query.numel() > 0
        # In a graph of the compiler it is an operator.
        and (torch.compiler.is_compiling() or not (is_traced() or has_tangents()))
    )


def rotate_both(
    query: Tensor,
    key: Tensor,
    start: int,
    *,
    base: float,
    scales: Scales | None,
    counter: Tensor | None = None,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Query (B, H, N, D) and key (B, Hk, N, D) rotated and scaled as by the tables of ``XPos``.

    Args:
        start: position of the first token.
        base: of the rotation's frequencies.
        scales: None does not scale.
        counter: () int64, in place of ``start``: it is read on the device.
        offsets: (B,) int64 of the grid in each row, None where all are 0.
    """
    numbers = (1.0, 0.0, None) if scales is None else scales
    rotated: tuple[Tensor, Tensor] = _rotate(
        query, key, counter, offsets, start, base, scales is not None, *numbers, False
    )
    return rotated


def _run(
    query: Tensor,
    key: Tensor,
    counter: Tensor | None,
    offsets: Tensor | None,
    start: int,
    base: float,
    scaled: bool,
    scale_base: float,
    centre: float,
    period: int | None,
    back: bool,
) -> tuple[Tensor, Tensor]:
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    outs = torch.empty_like(query), torch.empty_like(key)
    strides = tuple(x.stride()[:3] for x in (query, key, *outs))
    scales = Scales(scale_base, centre, period) if scaled else None
    launch = _launch(
        tuple(query.shape), key.shape[1], strides, 0 if counter is not None else start, base, scales, counter is not None,
        offsets is not None, back, query.dtype, query.device,
    )  # fmt: skip
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        launch.run((query, key, *outs, query if counter is None else counter, query if offsets is None else offsets))
    return outs


def _fake(query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    return torch.empty_like(query), torch.empty_like(key)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    counter, offsets = inputs[2:4]
    ctx.save_for_backward(counter, offsets)
    ctx.numbers = inputs[4:]


def _backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Any, ...]:
    *numbers, back = ctx.numbers
    return *_rotate(grad_query, grad_key, *ctx.saved_tensors, *numbers, not back), *[None] * 9


_SCHEMA = (
    "(Tensor query, Tensor key, Tensor? counter, Tensor? offsets, SymInt start, float base, bool scaled, float scale_base, "
    "float centre, int? period, bool back) -> (Tensor, Tensor)"
)
_call = define("rotate", _run, _fake, _SCHEMA)
torch.library.register_autograd("longnet::rotate", _backward, setup_context=_setup_context)
_rotate = caller_of("rotate", _call, _run, _setup_context, _backward)


@lru_cache(maxsize=256)
def _launch(
    shape: tuple[int, ...],
    kv_heads: int,
    strides: tuple[tuple[int, ...], ...],
    start: int,
    base: float,
    scales: Scales | None,
    counted: bool,
    by_row: bool,
    back: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Launch:
    """For tensors of known shapes and strides. Types and devices have launches of their own."""
    from longnet.nn.position.kernels import rotate_kernel

    batch, heads, tokens, dim = shape
    period = None if scales is None else scales.period
    single = tokens == 1
    # The heads of one token are side by side, or it would wait for one after the other.
    each, every = (1, 1) if single else (_TOKENS, heads + kv_heads)
    blocks, parts = -(-tokens // each), -(-(heads + kv_heads) // every)
    bits = (Value(_bits(number)) for number in (base, *((1.0, 0.0) if scales is None else scales[:2])))
    options = {
        "D": dim, "PAIRS": power_of_two(dim // 2, 1), "TOKENS": each, "HEADS": every, "COUNTED": counted,
        "SCALED": scales is not None, "REPEATS": period is not None, "BY_ROW": by_row, "BACK": back,
        "EXACT": dtype == torch.float32, "num_warps": 1 if single else 4,
    }  # fmt: skip
    counts = map(Value, (start, tokens, blocks, parts))
    if dim % 16:
        # Else all are multiples of 16 whatever the length, which copies of many bytes at once have to know.
        strides = tuple((Value(b), Value(h), n) for b, h, n in strides)
    rest = (*strides, *counts, heads, kv_heads, *bits, Value(period or 1))
    return Launch(rotate_kernel, batch * blocks * parts, (), rest, options)


def _bits(number: float) -> int:
    """A float64 as the integer of the same bits, which is above 0 for numbers of at least 0."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])
