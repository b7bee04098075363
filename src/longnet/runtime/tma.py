"""Tensors as matrices for the tensor memory accelerator, and quick launches of kernels that take many of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

# The views of a tensor that a kernel takes, one per branch of a nest; unused ones are None.
VIEWS = 5

# What a kernel is given of tensors: one, several as one argument, or none.
Pointer = Tensor | tuple[Tensor, ...] | None


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


def descriptors(view: View, dtype: torch.dtype, dim: int, rates: tuple[int, ...], rows: int) -> tuple[Any, ...]:
    """One descriptor per rate of a tensor with this view, for copies of ``rows`` rows; None up to ``VIEWS``."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block = [rows, dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)
    base = torch.empty(8, dtype=dtype, device="cpu")
    found = [
        TensorDescriptor(base, [view.tokens // rate, rate * view.token], [rate * view.token, 1], block, layout)
        for rate in rates
    ]
    # Every descriptor of a launch is encoded anew, so there are no more than are needed.
    return (*found, *[None] * (VIEWS - len(found)))


@dataclass(frozen=True, eq=False)
class Launch:
    """A launch of a kernel for tensors of known shapes, strides and types: all but the tensors themselves.

    Args:
        templates: of the inputs' descriptors, input after input.
        rest: the kernel's arguments after the descriptors, up to its constants.
        options: its constants, and how it is compiled.
    """

    kernel: Any
    programs: int
    templates: tuple[tuple[Any, ...], ...]
    rest: tuple[Any, ...]
    options: dict[str, Any]
    # By the alignment of the pointers, which Triton specialises on.
    _compiled: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    @cached_property
    def _constants(self) -> tuple[Any, ...]:
        return tuple(self.options[name] for name in self.kernel.arg_names if name in self.options)

    @cached_property
    def _slots(self) -> tuple[tuple[int, int, Any], ...]:
        """(place among the descriptors, input, template) of those that there are."""
        places = enumerate((number, one) for number, of_input in enumerate(self.templates) for one in of_input)
        return tuple((place, number, one) for place, (number, one) in places if one is not None)

    def run(self, pointers: tuple[Pointer, ...], inputs: tuple[Tensor, ...]) -> None:
        """Run it on the current device; from the second time on without Triton's dispatch, which would look at every argument.

        Args:
            pointers: the kernel's first arguments.
            inputs: the tensors of the descriptors, which come next.
        """
        views = [None] * (VIEWS * len(inputs))
        for place, number, template in self._slots:
            # Made by hand: the constructor checks all of it again, which takes longer than a short sequence's attention.
            views[place] = descriptor = object.__new__(type(template))
            descriptor.__dict__.update(template.__dict__, base=inputs[number])
        aligned = tuple(_alignment(x) for x in pointers)
        compiled = self._compiled.get(aligned)
        if compiled is None:
            made = self.kernel[self.programs, 1, 1](*pointers, *views, *self.rest, **self.options)
            self._compiled[aligned] = made
        else:
            compiled[self.programs, 1, 1](*pointers, *views, *self.rest, *self._constants)


def _alignment(pointer: Pointer) -> Any:
    if pointer is None or isinstance(pointer, Tensor):
        return pointer if pointer is None else pointer.data_ptr() % 16
    return tuple(x.data_ptr() % 16 for x in pointer)
