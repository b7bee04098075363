"""Repeated launches of a compiled kernel: internals of Triton's driver for NVIDIA GPUs.

In each launch Triton encodes every tensor descriptor, asks the driver about every pointer and prepares its launch hooks. That
takes longer than a short kernel runs. Here the same C function is called with the same arguments, and descriptors are kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# The views of a tensor that a kernel takes, one per branch of a nest; unused ones are None.
VIEWS = 5

# How many encoded inputs a launch keeps: those of the layers of a model.
_MOST_ADDRESSES = 128

# A tensor's descriptors, with any tensor as their base.
Templates = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Address:
    """In a tensor's place: all that is asked of the tensor of a descriptor. It keeps nothing alive."""

    address: int

    def data_ptr(self) -> int:
        return self.address


def descriptors_at(templates: Templates, base: Any) -> tuple[Any, ...]:
    """The descriptors of ``templates`` with another base, and None up to ``VIEWS``."""
    made: list[Any] = []
    for template in templates:
        if template is not None:
            # By hand: the constructor checks all of it again, which takes longer than a short sequence's attention.
            made.append(object.__new__(type(template)))
            made[-1].__dict__.update(template.__dict__, base=base)
    return (*made, *[None] * (VIEWS - len(made)))


@dataclass(frozen=True, eq=False)
class NativeLaunch:
    """Launches a compiled kernel on the current stream of one device.

    Args:
        function: in C.
        before, after: what it is given before the stream, and from there to the kernel's own arguments.
        as_tuple: whether it takes these as one tuple.
        stream_of: gives the current stream of a device.
        encode: gives what the function takes in a descriptor's place.
        inputs: for each input, each of its descriptors and how the kernel was compiled to take it.
    """

    function: Callable[..., Any]
    before: tuple[Any, ...]
    after: tuple[Any, ...]
    as_tuple: bool
    stream_of: Callable[[int], int]
    device: int
    encode: Callable[[Any, Any], Sequence[Any]]
    inputs: tuple[tuple[tuple[Any, Any], ...], ...]
    # By the number of the input and its address; torch gives a loop the same few addresses again and again.
    _encoded: dict[tuple[int, int], tuple[Any, ...]] = field(default_factory=dict)

    def __call__(self, addresses: Sequence[Any], inputs: Sequence[Tensor], rest: tuple[Any, ...]) -> None:
        """Launch it.

        Args:
            addresses: in place of the kernel's pointers.
            inputs: the tensors of the descriptors.
            rest: the kernel's other arguments, constants among them.
        """
        arguments = [*addresses]
        for number, x in enumerate(inputs):
            address = x.data_ptr()
            arguments += self._encoded.get((number, address)) or self._encode(number, address)
        arguments += rest
        stream = self.stream_of(self.device)
        if self.as_tuple:
            self.function(*self.before, stream, *self.after, tuple(arguments))
        else:
            self.function(*self.before, stream, *self.after, *arguments)

    def _encode(self, number: int, address: int) -> tuple[Any, ...]:
        if len(self._encoded) >= _MOST_ADDRESSES:
            self._encoded.clear()
        made: list[Any] = []
        views = descriptors_at(tuple(template for template, _ in self.inputs[number]), _Address(address))
        for view, (_, form) in zip(views, self.inputs[number], strict=False):
            made += self.encode(view, form)
        made += views[len(self.inputs[number]) :]
        self._encoded[number, address] = tuple(made)
        return self._encoded[number, address]


def has_launch_hooks() -> bool:
    """Whether something, a profiler say, is to be called around launches."""
    from triton import knobs

    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    # A chain of hooks may be empty.
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def native_launch(compiled: Any, programs: int, templates: Sequence[Templates]) -> NativeLaunch | None:
    """How a compiled kernel that was launched before is launched again; None where Triton's own launcher is needed.

    It is for other GPUs than NVIDIA's, for kernels with scratch memory, and for kernels that a sanitizer watches.

    Raises:
        AttributeError, ImportError, LookupError: Triton has another form.
    """
    launcher = compiled.run
    if f"{type(launcher).__module__}.{type(launcher).__name__}" != "triton.backends.nvidia.driver.CudaLauncher":
        return None
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    if getattr(launcher, "gsan_enabled", False):
        return None
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    forms = getattr(compiled.metadata, "tensordesc_meta", None) or ()
    used = [[template for template in each if template is not None] for each in templates]
    if len(forms) != sum(map(len, used)):
        # Descriptors in parts, as GPUs without the tensor memory accelerator take them.
        return None
    function = launcher.launch
    if inspect.isfunction(function):
        # It encodes descriptors, then calls what it is closed over.
        function = inspect.getclosurevars(function).nonlocals["launcher"]
    # What the launcher would give it, with marks for the stream and for the kernel's arguments.
    stream, argument, given = object(), object(), list[Any]()
    marked = copy(launcher)
    marked.launch = lambda *arguments: given.extend(arguments)
    marked(programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, argument)
    *others, last = given
    if last is not argument and last != (argument,):
        raise LookupError("CudaLauncher.launch with the kernel's arguments last")
    at = others.index(stream)
    in_order = iter(forms)
    encode = nvidia.make_tensordesc_arg
    # Triton 3.7 and newer hand it the arguments before the kernel's, which it does not read.
    unread = [None] * (len(inspect.signature(encode).parameters) - 2)
    return NativeLaunch(
        function,
        tuple(others[:at]),
        tuple(others[at + 1 :]),
        last is not argument,
        driver.active.get_current_stream,
        driver.active.get_current_device(),
        lambda descriptor, form: encode(descriptor, form, *unread),
        tuple(tuple((template, next(in_order)) for template in each) for each in used),
    )
