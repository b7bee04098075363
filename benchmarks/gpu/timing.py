"""Timing on a device's own clock: calls queue up behind each other as in a model, a mark before and after each."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from itertools import cycle

from benchmarks.contenders import Contender
from benchmarks.gpu.machine import Machine

Functions = Mapping[str, Callable[[], object]]

# Calls shorter than this could run dry while the host prepares the next one.
_SHORT_SECONDS = 0.02


def rotated(contenders: list[Contender]) -> Contender:
    """One contender that takes the next one's inputs at every call, so that they do not lie in the cache already."""

    def turn(which: str) -> Callable[[], tuple[object, ...]]:
        functions = cycle([one.passes[which] for one in contenders])
        return lambda: next(functions)()

    first = contenders[0]
    return Contender(first.name, {which: turn(which) for which in first.passes})  # type: ignore[misc]


def warm_up(machine: Machine, function: Callable[[], object]) -> float:
    """Call twice; seconds of the second call, launching included."""
    for _ in range(2):
        machine.finish()
        start = time.perf_counter()
        result = function()
        machine.finish()
        took = time.perf_counter() - start
        del result
    return took


def interleave(machine: Machine, functions: Functions, least: int, most: int, budget: float) -> dict[str, list[float]]:
    """Seconds of every call on the device, by name: a, b, a, b, ... after a warm-up of each.

    When a round is short, work is queued before it, so that what is timed is the device and not the host's launching.

    Args:
        functions: what is compared.
        least, most: rounds; as many as fit into the budget of seconds, judged by the warm-up.
        budget: for all rounds together.
    """
    expected = sum(warm_up(machine, function) for function in functions.values())
    rounds = max(least, min(most, int(budget / expected)))
    marks: dict[str, list[tuple[object, object]]] = {name: [] for name in functions}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            if expected < _SHORT_SECONDS:
                machine.occupy()
            for name, function in functions.items():
                start = machine.mark()
                result = function()
                marks[name].append((start, machine.mark()))
                del result
        machine.finish()
    finally:
        gc.enable()
    return {name: [machine.seconds(*pair) for pair in pairs] for name, pairs in marks.items()}


def wall(machine: Machine, function: Callable[[], object], calls: int = 20) -> float:
    """Seconds a call by the host's clock, calls back to back: what launching costs shows here and nowhere else."""
    machine.finish()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    machine.finish()
    return (time.perf_counter() - start) / calls
