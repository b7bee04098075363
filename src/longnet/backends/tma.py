"""Tensors as matrices for the tensor memory accelerator, and quick launches of kernels that take many of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Kernels take so many views of every tensor, one per branch of a nest; the others are None.
VIEWS = 5


@dataclass(frozen=True)
class View:
    """A tensor (B, H, N, D) as a matrix whose rows hold some tokens each.

    Token n of head h and batch b lies in row ``t // step``, column ``t % step * token + h * column``, where
    ``t = b * batch + h * head + n`` and ``step`` is the tokens of a row.
    """

    batch: int
    head: int
    column: int
    token: int
    tokens: int

    @property
    def arguments(self) -> tuple[int, int, int, int]:
        return (self.batch, self.head, self.column, self.token)


def view_of(x: Tensor) -> View | None:
    """The tensor as a matrix, or None if its strides allow none."""
    return _view(tuple(x.shape), x.stride())


@lru_cache(maxsize=1024)
def _view(shape: tuple[int, ...], stride: tuple[int, ...]) -> View | None:
    batch, heads, length, dim = shape
    by_batch, by_head, by_token, by_channel = stride
    # A stride that is never taken may be anything.
    by_batch = by_batch if batch > 1 else by_token * length * heads
    by_head = by_head if heads > 1 else by_token * length
    if by_channel != 1 or by_token < dim or by_batch % by_token:
        return None
    if by_head < by_token:
        if by_head * heads > by_token:
            return None
        return View(by_batch // by_token, 0, by_head, by_token, (batch - 1) * (by_batch // by_token) + length)
    if by_head % by_token:
        return None
    tokens = (batch - 1) * (by_batch // by_token) + (heads - 1) * (by_head // by_token) + length
    return View(by_batch // by_token, by_head // by_token, 0, by_token, tokens)


def is_matrix(x: Tensor, dim: int, unit: int) -> bool:
    """Whether x (B, H, N, D) has ``dim`` channels and views of every rate that divides ``unit``, as it lies in memory."""
    return x.data_ptr() % 16 == 0 and _is_matrix(tuple(x.shape), x.stride(), dim, unit, x.element_size())


@lru_cache(maxsize=1024)
def _is_matrix(shape: tuple[int, ...], stride: tuple[int, ...], dim: int, unit: int, element_size: int) -> bool:
    view = _view(shape, stride)
    return (
        view is not None
        and shape[-1] == dim
        and view.token * element_size % 16 == 0
        and not any(count % unit for count in (view.tokens, view.batch, view.head))
    )


@lru_cache(maxsize=1024)
def _templates(view: View, dtype: torch.dtype, dim: int, rates: tuple[int, ...], rows: int) -> tuple[Any, ...]:
    """Descriptors of any tensor with this view, one per branch, for copies of so many rows, and None up to ``VIEWS``."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block = [rows, dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)
    base = torch.empty(8, dtype=dtype, device="cpu")
    found = [
        TensorDescriptor(base, [view.tokens // rate, rate * view.token], [rate * view.token, 1], block, layout)
        for rate in rates
    ]
    return (*found, *[None] * (VIEWS - len(found)))


def descriptors(x: Tensor, rates: tuple[int, ...], rows: int) -> list[Any]:
    """One view of the tensor per rate, for copies of so many rows. Its strides have been found to allow them."""
    view = view_of(x)
    assert view is not None
    found: list[Any] = []
    for template in _templates(view, x.dtype, x.shape[-1], rates, rows):
        if template is None:
            # Every descriptor of a launch is encoded anew.
            found.append(None)
            continue
        # Made by hand: the constructor checks all of it again, which takes longer than a short sequence's attention.
        descriptor = object.__new__(type(template))
        descriptor.__dict__.update(template.__dict__, base=x)
        found.append(descriptor)
    return found


def folds(tensors: tuple[Tensor, ...]) -> Iterator[tuple[int, ...]]:
    for x in tensors:
        view = view_of(x)
        assert view is not None
        yield view.arguments


# Compiled kernels, by everything that Triton specialises on.
_COMPILED: dict[tuple[Any, ...], Any] = {}
_MOST_COMPILED = 4096


def _seen(argument: Any) -> Any:
    """What Triton may specialise on. A descriptor's type follows from the results' type and the constants."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.device, argument.data_ptr() % 16
    return argument if isinstance(argument, int | tuple) else None


def launch(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Run a kernel; from the second time on without Triton's dispatch, which would go through every argument again.

    ``arguments`` are the kernel's first parameters, its constants are among ``options``. The current device is theirs.
    """
    key = (id(kernel), *map(_seen, arguments), *options.values())
    compiled = _COMPILED.get(key)
    if compiled is None:
        if len(_COMPILED) >= _MOST_COMPILED:
            _COMPILED.clear()
        _COMPILED[key] = kernel[programs, 1, 1](*arguments, **options)
    else:
        constants = (options[name] for name in kernel.arg_names[len(arguments) :])
        compiled[programs, 1, 1](*arguments, *constants)
