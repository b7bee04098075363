"""Time per token from short to long, and the curves of quadratic attention and peers beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from benchmarks.cases import Case, Sizes, Tensors, draw
from benchmarks.checks import allowed_at_size, rows_at_size
from benchmarks.contenders import Contender, dense, ours
from benchmarks.peers import Make, Peer
from benchmarks.timing import interleave


def growth(dtype: str, peers: list[Peer], sizes: Sizes) -> dict[str, Any]:
    """Seconds of a forward at every length, all lengths in turn in every round.

    Raises:
        CheckFailed: a length whose result is not the definition's.
    """
    longest = sizes.case(max(sizes.growth_lengths), dtype)
    storage = draw(longest)
    checks, contenders = [], {}
    for length in sizes.growth_lengths:
        case = sizes.case(length, dtype)
        tensors = storage.first(*case.shape)
        contenders[length] = ours(case, tensors)
        (out,) = contenders[length].passes["forward"]()
        checks += rows_at_size(case, tensors, out, allowed_at_size(case, tensors)[0])
        del out
    repetitions = sizes.growth_repetitions
    seconds = interleave(
        {str(length): one.passes["forward"] for length, one in contenders.items()}, repetitions, repetitions, 0.0
    )
    return {
        "dtype": dtype,
        "lengths": list(sizes.growth_lengths),
        "checks": [asdict(check) for check in checks],
        "seconds": seconds,
        "curves": _curves(dtype, storage, peers, sizes),
    }


def _curves(dtype: str, storage: Tensors, peers: list[Peer], sizes: Sizes) -> dict[str, dict[str, list[float]]]:
    """By name and length: dense attention and peers, each until a call is expected to take too long."""
    curves: dict[str, dict[str, list[float]]] = {}
    makers: dict[str, Callable[[Case, Tensors], Contender]] = {"dense": dense}
    makers |= {peer.name: partial(_peer, peer.make) for peer in peers if peer.make}
    for length in sizes.growth_lengths:
        case = sizes.case(length, dtype)
        expected = {name: _expected(curves.get(name, {}), length, 2 if name == "dense" else 1) for name in makers}
        functions = {
            name: make(case, storage.first(*case.shape)).passes["forward"]
            for name, make in makers.items()
            if expected[name] <= sizes.slow_seconds[1]
        }
        for name, seconds in interleave(functions, 2, 2, 0.0).items() if functions else ():
            curves.setdefault(name, {})[str(length)] = seconds
    return curves


def _peer(make: Make, case: Case, tensors: Tensors) -> Contender:
    return make(case, tensors.rows())


def _expected(curve: dict[str, list[float]], length: int, power: int) -> float:
    """Seconds expected of what grows with this power of the length, from the longest one measured; 0 before the first."""
    known = {int(at): min(seconds) for at, seconds in curve.items()}
    return known[max(known)] * (length / max(known)) ** power if known else 0.0
