"""Internals of Triton: descriptors without their constructor, launches without its dispatch, and what it knows of a GPU.

The first two save host time: a kernel that takes many tensors is otherwise done before it has been launched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from longnet.runtime.tma import View
from longnet.runtime.triton_support import interpreting
from longnet.runtime.versions import Tried

TRIED = Tried("triton", "3.6", "3.9")

# The views of a tensor that a kernel takes, one per branch of a nest; unused ones are None.
VIEWS = 5

# How many descriptors of inputs a launch keeps.
_MOST_ADDRESSES = 64

# What a kernel is given of tensors: one, several as one argument, or none.
Pointer = Tensor | tuple[Tensor, ...] | None


@lru_cache(maxsize=64)
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have on a GPU; anywhere else, as in the interpreter, there is no limit."""
    if device.type != "cuda":
        return 1 << 30
    try:
        from triton.runtime import driver

        return int(driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"])
    except (ImportError, AttributeError, KeyError) as error:
        raise TRIED.gone(error) from None


def descriptors(view: View, dtype: torch.dtype, dim: int, rates: tuple[int, ...], rows: int) -> tuple[Any, ...]:
    """One descriptor per rate of a tensor with this view, for copies of ``rows`` rows; None up to ``VIEWS``."""
    try:
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    except ImportError as error:
        raise TRIED.gone(error) from None
    block = [rows, dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)
    base = torch.empty(8, dtype=dtype, device="cpu")
    used = [
        TensorDescriptor(base, [view.tokens // rate, rate * view.token], [rate * view.token, 1], block, layout)
        for rate in rates
    ]
    if vars(used[0]).get("base") is not base:
        raise TRIED.gone("TensorDescriptor with its tensor as the attribute base, which launches replace")
    # Every descriptor of a launch is encoded anew, so there are no more than are needed.
    return (*used, *[None] * (VIEWS - len(used)))


@dataclass(frozen=True, slots=True)
class _Address:
    """In a tensor's place: all that a launch of a compiled kernel asks of the tensor of a descriptor. It keeps nothing alive."""

    address: int

    def data_ptr(self) -> int:
        return self.address


class Value(int):
    """A number of a launch for which its kernel is not compiled: any other number gives the same kernel.

    Triton compiles anew where a number is 1, becomes or ceases to be a multiple of 16, or needs 64 bits.
    """


def _plain(argument: Any) -> Any:
    """A launch's argument with ints in place of values."""
    return _with_values(argument, int)


def _typical(argument: Any) -> Any:
    """What a kernel is compiled for in an argument's place."""
    return _with_values(argument, lambda value: 3 if -(1 << 31) <= value < 1 << 31 else (1 << 33) + 1)


def _with_values(argument: Any, convert: Callable[[Value], int]) -> Any:
    if isinstance(argument, Value):
        return convert(argument)
    if isinstance(argument, tuple):
        converted = [_with_values(one, convert) for one in argument]
        # A named tuple takes its fields one by one.
        return type(argument)(*converted) if hasattr(argument, "_fields") else tuple(converted)
    return argument


@dataclass(frozen=True, eq=False)
class Launch:
    """A launch of a kernel for tensors of known shapes, strides and types: all but the tensors themselves.

    Args:
        templates: of the inputs' descriptors, input after input.
        rest: the kernel's arguments after the descriptors, up to its constants; what is a :class:`Value` it is not compiled for.
        options: its constants, and how it is compiled.
    """

    kernel: Any
    programs: int
    templates: tuple[tuple[Any, ...], ...]
    rest: tuple[Any, ...]
    options: dict[str, Any]
    # By the alignment of the pointers, which Triton specialises on.
    _compiled: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    # Descriptors by the number of the input and its address.
    _kept: dict[tuple[int, int], tuple[Any, ...]] = field(default_factory=dict)

    @cached_property
    def _rest(self) -> tuple[Any, ...]:
        plain: tuple[Any, ...] = _plain(self.rest)
        return plain

    @cached_property
    def _constants(self) -> tuple[Any, ...]:
        try:
            names = self.kernel.arg_names
        except AttributeError as error:
            raise TRIED.gone(error) from None
        return tuple(self.options[name] for name in names if name in self.options)

    def _descriptors(self, number: int, base: Any) -> tuple[Any, ...]:
        """Of an input with another tensor in the templates' place."""
        made: list[Any] = []
        for template in self.templates[number]:
            if template is not None:
                # Made by hand: the constructor checks all of it again, which takes longer than a short sequence's attention.
                made.append(object.__new__(type(template)))
                made[-1].__dict__.update(template.__dict__, base=base)
        return (*made, *[None] * (VIEWS - len(made)))

    def _kept_descriptors(self, number: int, address: int) -> tuple[Any, ...]:
        """Of an input that lies at an address; torch gives a loop the same few addresses again and again."""
        found = self._kept.get((number, address))
        if found is None:
            if len(self._kept) >= _MOST_ADDRESSES:
                self._kept.clear()
            found = self._kept[number, address] = self._descriptors(number, _Address(address))
        return found

    def run(self, pointers: tuple[Pointer, ...], inputs: tuple[Tensor, ...] = ()) -> None:
        """Run it on the current device, without Triton's dispatch, which would look at every argument each time.

        Args:
            pointers: the kernel's first arguments.
            inputs: the tensors of the descriptors, which come next.
        """
        aligned = tuple([_alignment(x) for x in pointers])
        compiled = self._compiled.get(aligned)
        if compiled is None:
            compiled = self.compile(pointers, inputs)
            if compiled is None:
                # The interpreter compiles nothing.
                views = chain.from_iterable(self._descriptors(number, x) for number, x in enumerate(inputs))
                self.kernel[self.programs, 1, 1](*pointers, *views, *self._rest, **self.options)
                return
            if hasattr(compiled, "result"):
                # Someone's mode of asynchronous compilation is on.
                compiled = compiled.result()
            if not hasattr(compiled, "__getitem__"):
                raise TRIED.gone("the compiled kernel as the result of warmup, to be launched by [grid](*arguments)")
            self._compiled[aligned] = compiled
        views = chain.from_iterable([self._kept_descriptors(number, x.data_ptr()) for number, x in enumerate(inputs)])
        compiled[self.programs, 1, 1](*pointers, *views, *self._rest, *self._constants)

    def compile(self, pointers: tuple[Pointer, ...], inputs: tuple[Tensor, ...]) -> Any:
        """The kernel for such tensors, which Triton keeps; None in its interpreter. Inputs may be on the device meta."""
        views = chain.from_iterable(self._descriptors(number, x) for number, x in enumerate(inputs))
        try:
            warmup = self.kernel.warmup
        except AttributeError as error:
            raise TRIED.gone(error) from None
        return warmup(*pointers, *views, *_typical(self.rest), grid=(self.programs, 1, 1), **self.options)


def compile_together(launches: Sequence[tuple[Launch, tuple[Pointer, ...], tuple[Tensor, ...]]]) -> None:
    """Compile the kernels of several launches side by side, each given its pointers and inputs.

    A kernel takes seconds, and Triton would compile one after the other. Kernels that it has are not compiled again.
    """
    if len(launches) < 2 or interpreting():
        return
    try:
        from triton import AsyncCompileMode
    except ImportError as error:
        raise TRIED.gone(error) from None

    def compile_all() -> None:
        with ThreadPoolExecutor(min(len(launches), os.cpu_count() or 1)) as pool, AsyncCompileMode(pool):
            for launch, pointers, inputs in launches:
                launch.compile(pointers, inputs)

    # Triton has one such mode at a time in a context, and a caller may have one.
    Context().run(compile_all)


def _alignment(pointer: Pointer) -> Any:
    if isinstance(pointer, tuple):
        return tuple(x.data_ptr() % 16 for x in pointer)
    return None if pointer is None else pointer.data_ptr() % 16
