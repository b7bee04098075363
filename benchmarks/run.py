"""What every suite is given: the device, the cells to measure, how often to repeat, and the result so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cases import Record
from benchmarks.device import Device
from benchmarks.peers import Peer
from benchmarks.timing import Function, interleave


@dataclass(frozen=True)
class Effort:
    """How often calls are repeated.

    ``rounds`` and ``beside_rounds`` (with other implementations) are as many as fit into ``budget_seconds``, between the two
    numbers. Dense attention is left out of the speed table, and a curve ends, where a call is expected to take longer than
    ``slow_seconds`` and ``curve_seconds``. Sizes that are not ``judged`` show only that the benchmark works.
    """

    rounds: tuple[int, int]
    budget_seconds: float
    beside_rounds: tuple[int, int]
    growth_rounds: int
    curve_rounds: int
    noise_rounds: int = 0
    slow_seconds: float = math.inf
    curve_seconds: float = math.inf
    judged: bool = False


# By scale: the device's kind, or small sizes of it.
EFFORTS = {
    "cpu": Effort((7, 15), 20.0, (7, 15), 5, 2, 10, 3.0, 12.0, judged=True),
    "cpu-quick": Effort((3, 3), 1.0, (3, 3), 3, 2, 3),
    "cuda": Effort((5, 25), 1.5, (3, 3), 5, 3, curve_seconds=1.5, judged=True),
    "cuda-quick": Effort((3, 3), 0.0, (2, 2), 3, 3, curve_seconds=1.5),
}


@dataclass
class Run:
    """A run of the benchmark; ``result`` is plain JSON throughout."""

    device: Device
    effort: Effort
    cells: dict[str, tuple[Any, ...]]
    peers: list[Peer] = field(default_factory=list)
    result: Record = field(default_factory=dict)

    def time(self, functions: Mapping[str, Function], rounds: tuple[int, int] | None = None) -> dict[str, list[float]]:
        """:func:`benchmarks.timing.interleave` with this run's rounds."""
        return interleave(self.device, functions, *(rounds or self.effort.rounds), self.effort.budget_seconds)


@dataclass(frozen=True)
class Suite:
    """Data and one function: what is measured at each scale, and how one cell of it is measured.

    ``limits`` are entries of the result's ``limits`` by kind of device. The result of a ``single`` suite is one record, of
    others a list.
    """

    name: str
    cells: dict[str, tuple[Any, ...]]
    measure: Callable[[Run, Any], Record | list[Record]]
    limits: dict[str, dict[str, Any]] = field(default_factory=dict)
    single: bool = False
