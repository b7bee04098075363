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

from longnet.runtime.launcher_internals import VIEWS, NativeLaunch, descriptors_at, has_launch_hooks, native_launch
from longnet.runtime.tma import View
from longnet.runtime.triton_support import interpreting
from longnet.runtime.versions import Tried

TRIED = Tried("triton", "3.6", "3.9")

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
    # The kernel as compiled, by the alignment of the pointers, which Triton specialises on; and how it is launched again.
    _compiled: dict[tuple[Any, ...], tuple[Any, NativeLaunch | None]] = field(default_factory=dict)

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

    @cached_property
    def _last(self) -> tuple[Any, ...]:
        """What a compiled kernel is given after its descriptors."""
        return *self._rest, *self._constants

    def _descriptors(self, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        views = [descriptors_at(each, x) for each, x in zip(self.templates, inputs, strict=True)]
        return tuple(chain.from_iterable(views))

    def run(self, pointers: tuple[Pointer, ...], inputs: tuple[Tensor, ...] = ()) -> None:
        """Run it on the current device, without Triton's dispatch, which would look at every argument each time.

        Args:
            pointers: the kernel's first arguments.
            inputs: the tensors of the descriptors, which come next.
        """
        addresses = [x.data_ptr() if isinstance(x, Tensor) else _addresses(x) for x in pointers]
        aligned = tuple([x % 16 if isinstance(x, int) else _alignments(x) for x in addresses])
        compiled, native = self._compiled.get(aligned, (None, None))
        if native is not None and not has_launch_hooks():
            native(addresses, inputs, self._last)
        elif compiled is not None:
            compiled[self.programs, 1, 1](*pointers, *self._descriptors(inputs), *self._last)
        else:
            self._run_first(aligned, pointers, inputs)

    def _run_first(self, aligned: tuple[Any, ...], pointers: tuple[Pointer, ...], inputs: tuple[Tensor, ...]) -> None:
        compiled = self.compile(pointers, inputs)
        if compiled is None:
            # The interpreter compiles nothing.
            options = self.options
            self.kernel[self.programs, 1, 1](*pointers, *self._descriptors(inputs), *self._rest, **options)
            return
        if hasattr(compiled, "result"):
            # Someone's mode of asynchronous compilation is on.
            compiled = compiled.result()
        if not hasattr(compiled, "__getitem__"):
            raise TRIED.gone("the compiled kernel as the result of warmup, to be launched by [grid](*arguments)")
        # Triton loads it, or says why it cannot.
        compiled[self.programs, 1, 1](*pointers, *self._descriptors(inputs), *self._last)
        try:
            native = native_launch(compiled, self.programs, self.templates)
        except (AttributeError, ImportError, LookupError) as error:
            raise TRIED.gone(error) from None
        self._compiled[aligned] = compiled, native

    def compile(self, pointers: tuple[Pointer, ...], inputs: tuple[Tensor, ...]) -> Any:
        """The kernel for such tensors, which Triton keeps; None in its interpreter. Inputs may be on the device meta."""
        try:
            warmup = self.kernel.warmup
        except AttributeError as error:
            raise TRIED.gone(error) from None
        return warmup(
            *pointers, *self._descriptors(inputs), *_typical(self.rest), grid=(self.programs, 1, 1), **self.options
        )


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


def _addresses(pointer: tuple[Tensor, ...] | None) -> tuple[int, ...] | None:
    return None if pointer is None else tuple([x.data_ptr() for x in pointer])


def _alignments(addresses: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return None if addresses is None else tuple([x % 16 for x in addresses])
