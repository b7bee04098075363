"""Side-by-side timing in one process: a, b, a, b, ..., warmed up, every repetition kept."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping

Functions = Mapping[str, Callable[[], object]]


def interleave(functions: Functions, least: int, most: int, budget_seconds: float) -> dict[str, list[float]]:
    """Seconds of every call, by name; a slow drift of the machine then hits all of them alike.

    Args:
        functions: what is compared, each called once for warming up and then once a round.
        least, most: rounds; as many as fit into the budget, judged by the warm-up.
        budget_seconds: for all rounds together.
    """
    warm_up = sum(call(function) for function in functions.values())
    rounds = least if least == most else max(least, min(most, int(budget_seconds / warm_up)))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, function in functions.items():
                seconds[name].append(call(function))
    finally:
        gc.enable()
    return seconds


def call(function: Callable[[], object]) -> float:
    """Seconds of one call; its result is freed after the clock is read."""
    start = time.perf_counter()
    result = function()
    stop = time.perf_counter()
    del result
    return stop - start


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
