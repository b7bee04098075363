"""A call as steps on tensors that have names: its first run writes them down, later runs of such tensors repeat them.

What a call has to look up and work out (nests, launches, their numbers) takes longer than attention over a short sequence. As
all steps are known before the first is run, their kernels are compiled side by side.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from longnet.runtime.triton_internals import Launch, compile_together

# By name; None where a kernel is given no tensor.
Tensors = dict[str, Any]


class Step(Protocol):
    """One of the steps of a call: all it needs but the tensors."""

    def announce(self, tensors: Tensors, /) -> None:
        """Add what :meth:`run` will add, on the device meta: shapes, strides and types of what later steps are given."""

    def run(self, tensors: Tensors, /) -> None: ...


@dataclass(frozen=True, eq=False)
class Run:
    """The launch of a kernel.

    Args:
        pointers: the kernel's first arguments, by name.
        inputs: the tensors of the descriptors, by name.
    """

    launch: Launch
    pointers: tuple[str, ...]
    inputs: tuple[str, ...] = ()

    def announce(self, tensors: Tensors) -> None:
        pass

    def given(self, tensors: Tensors) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
        """(pointers, inputs) of the launch."""
        return tuple([tensors[name] for name in self.pointers]), tuple([tensors[name] for name in self.inputs])

    def run(self, tensors: Tensors) -> None:
        self.launch.run(*self.given(tensors))


@dataclass(frozen=True, eq=False)
class Lookup:
    """A tensor that depends on shapes alone, asked for in every call: ``look_up`` knows which stream is to read it."""

    name: str
    look_up: Callable[[], Tensor]

    def announce(self, tensors: Tensors) -> None:
        self.run(tensors)

    def run(self, tensors: Tensors) -> None:
        tensors[self.name] = self.look_up()


@dataclass(frozen=True)
class Fill:
    """A tensor filled with one value."""

    name: str
    value: float = 0.0

    def announce(self, tensors: Tensors) -> None:
        pass

    def run(self, tensors: Tensors) -> None:
        tensors[self.name].fill_(self.value)


def _announced(steps: Iterator[Step], tensors: Tensors) -> tuple[Step, ...]:
    made: list[Step] = []
    for step in steps:
        step.announce(tensors)
        made.append(step)
    return tuple(made)


def _launches(steps: Iterable[Step], tensors: Tensors) -> list[tuple[Launch, tuple[Any, ...], tuple[Tensor, ...]]]:
    return [(step.launch, *step.given(tensors)) for step in steps if isinstance(step, Run)]


class RepeatedSteps:
    """The steps of the ``most`` calls that were run last."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._steps: OrderedDict[Hashable, tuple[Step, ...]] = OrderedDict()
        self._newest: tuple[Step, ...] | None = None

    def run(
        self,
        key: Hashable,
        tensors: Tensors,
        make: Callable[[], Iterator[Step]],
        following: Callable[[], tuple[Iterator[Step], Tensors]] | None = None,
    ) -> None:
        """Run the steps of a call.

        Args:
            key: all that the steps depend on.
            tensors: of the call; steps may add some.
            make: gives the steps one by one. Each is announced before it is asked for the next, so it finds what steps will add.
            following: the steps of a call that will come next, and tensors like those that it will be given. Its kernels are
                compiled along with this call's.
        """
        steps = self._steps.get(key)
        is_newest = steps is not None and steps is self._newest
        if steps is None:
            steps = _announced(make(), tensors)
            launches = _launches(steps, tensors)
            if following is not None:
                upcoming, likely = following()
                launches += _launches(_announced(upcoming, likely), likely)
            compile_together(launches)
        for step in steps:
            step.run(tensors)
        if is_newest:
            return
        # Last again; another thread may have taken it out meanwhile.
        self._steps.pop(key, None)
        self._steps[key] = self._newest = steps
        if len(self._steps) > self._most:
            self._steps.popitem(last=False)

    def clear(self) -> None:
        """Forget all of them, where something has changed that keys do not hold."""
        self._steps.clear()
        self._newest = None
