"""What is timed and how: side by side (a, b, a, b, ...), warmed up, every repetition recorded, on the device's clock."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from benchmarks.cases import Case, Tensors
from benchmarks.checks import Attend, attend_dense, attend_dilated
from benchmarks.device import Device

Function = Callable[[], object]

# Rounds shorter than this could run dry while the host launches the next call.
_SHORT_SECONDS = 0.02


@dataclass(frozen=True)
class Contender:
    """Something to time: ``passes["forward"]()`` gives out, ``passes["forward_backward"]()`` out and gradients."""

    name: str
    passes: dict[str, Callable[[], tuple[Tensor, ...]]]


def contender(name: str, attend: Attend, tensors: Tensors) -> Contender:
    """A differentiable function of q, k, v on given tensors."""
    leaves = tuple(x.detach().requires_grad_() for x in tensors.inputs)

    def forward() -> tuple[Tensor, ...]:
        return (attend(*tensors.inputs),)

    def forward_backward() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return (out, *torch.autograd.grad(out, leaves, tensors.grad_out))

    return Contender(name, {"forward": forward, "forward_backward": forward_backward})


def ours(case: Case, tensors: Tensors, name: str = "ours") -> Contender:
    """``longnet.dilated_attention``, through autograd."""
    return contender(name, attend_dilated(case), tensors)


def bare_dense(device: Device, tensors: Tensors, is_causal: bool, name: str = "dense") -> Contender:
    """The device's fastest dense attention on (B, H, N, D), forward and backward called without autograd."""

    def forward() -> tuple[Tensor, ...]:
        return device.attend(tensors, is_causal)[:1]

    def forward_backward() -> tuple[Tensor, ...]:
        saved = device.attend(tensors, is_causal)
        return (saved[0], *device.attend_backward(tensors, saved, is_causal))

    return Contender(name, {"forward": forward, "forward_backward": forward_backward})


def dense(device: Device, case: Case, tensors: Tensors) -> Contender:
    """Dense attention over the whole sequence, quadratic, another function: cuDNN's on a GPU, through autograd on a CPU."""
    if device.kind == "cuda":
        return bare_dense(device, tensors, case.is_causal)
    return contender("dense", attend_dense(case.is_causal), tensors)


def reference_kind(device: Device, case: Case) -> str:
    """What a case is compared with: on a GPU dense attention over the whole sequence where that is short."""
    short = device.kind == "cuda" and case.length < max(case.segment_lengths)
    return "dense" if short else "same_flop"


def reference_ratio(device: Device, case: Case) -> float:
    """What the reference's time is multiplied by."""
    return float(case.flop_ratio) if reference_kind(device, case) == "same_flop" else 1.0


def reference(device: Device, case: Case, tensors: Tensors) -> Contender:
    """torch's fastest dense attention on the same random numbers.

    As (blocks, H, block, D), one block as long as the rows of a segment: what dilation would cost if reading strided rows
    and mixing were free, its time to be scaled by ``case.flop_ratio``. Short sequences on a GPU: as (B, H, N, D).
    """
    kind = reference_kind(device, case)
    if kind == "same_flop":
        tensors = tensors.first(case.batch * case.blocks, case.heads, case.block, case.head_dim)
    return bare_dense(device, tensors, case.is_causal, kind)


def interleave(
    device: Device, functions: Mapping[str, Function], least: int, most: int, budget_seconds: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of every call, by name; a slow drift of the device then hits all of them alike.

    Args:
        device: where a device queues work, some is queued before a short round, so that the device is timed and not the
            host's launching.
        functions: what is compared, each warmed up and then called once a round.
        least, most: rounds; as many as fit into the budget, judged by the warm-up.
        budget_seconds: for all rounds together.
    """
    expected = sum(warm_up(device, function) for function in functions.values())
    rounds = least if least == most else max(least, min(most, int(budget_seconds / expected)))
    marks: dict[str, list[tuple[object, object]]] = {name: [] for name in functions}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            if expected < _SHORT_SECONDS:
                device.occupy()
            for name, function in functions.items():
                start = device.start()
                result = function()
                marks[name].append((start, device.stop()))
                # Freed after the clock is read.
                del result
        device.finish()
    finally:
        gc.enable()
    return {name: [device.seconds(*pair) for pair in pairs] for name, pairs in marks.items()}


def warm_up(device: Device, function: Function) -> float:
    """Seconds of the last of the calls that count for nothing: one, or two where the first one only fills queues."""
    took = 0.0
    for _ in range(2 if device.queues else 1):
        took = host_seconds(device, function)
    return took


def host_seconds(device: Device, function: Function, calls: int = 1) -> float:
    """Seconds a call by the host's clock, calls back to back: what launching costs shows here alone."""
    device.finish()
    start = time.perf_counter()
    for _ in range(calls):
        result = function()
        del result
    device.finish()
    return (time.perf_counter() - start) / calls


def settle(device: Device, function: Function, seconds: float) -> None:
    """Call at least twice and for some seconds: host and device settle after compiling."""
    began, calls = time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - began < seconds:
        host_seconds(device, function)
        calls += 1


def repeated(function: Function, calls: int) -> Callable[[], None]:
    """One function of several calls."""

    def run() -> None:
        for _ in range(calls):
            function()

    return run


def rotated(contenders: list[Contender]) -> Contender:
    """One contender that takes the next one's inputs at every call, so that they are not in the cache already."""

    def turn(which: str) -> Callable[[], tuple[object, ...]]:
        functions = cycle([one.passes[which] for one in contenders])
        return lambda: next(functions)()

    first = contenders[0]
    return Contender(first.name, {which: turn(which) for which in first.passes})  # type: ignore[misc]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
