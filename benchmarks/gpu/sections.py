"""Ceilings, memory, GigaPath's shape and growth."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks.cases import Case, Tensors, draw, draw_shape
from benchmarks.checks import Attend, allowed_at_size, attend_dilated, rows_at_size
from benchmarks.contenders import Contender, ours
from benchmarks.gpu.cases import GpuSizes
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.speed import beside, dense, input_sets
from benchmarks.gpu.timing import interleave, rotated
from benchmarks.peers import Peer


def ceilings(machine: Machine, sizes: GpuSizes) -> dict[str, Any]:
    """What the device can do today: a bf16 matrix product of random data, and a copy counted as read plus written."""
    side = sizes.matrix
    one, other, *_ = draw_shape((side, side), torch.bfloat16, 0, machine.device).all
    source = torch.randint(0, 256, (sizes.copy_bytes,), dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    functions: dict[str, Callable[[], object]] = {
        "matrix": lambda: torch.mm(one, other),
        "copy": lambda: target.copy_(source),
    }
    seconds = {name: interleave(machine, {name: function}, 20, 20, 0.0)[name] for name, function in functions.items()}
    return {
        "matrix_side": side,
        "matrix_flops": 2 * side**3,
        "copy_bytes": 2 * sizes.copy_bytes,
        "seconds": seconds,
    }


def memory(machine: Machine, case: Case, which: str, peers: list[Peer]) -> dict[str, Any]:
    """Most bytes that torch's allocator held beyond q, k, v during one call, out and its gradient included.

    Raises:
        CheckFailed: the result measured there is not the definition's.
    """
    tensors = draw(case, 0, machine.device)
    peak, out = _peak(machine, attend_dilated(case), tensors, which)
    checks = rows_at_size(case, tensors, out, allowed_at_size(case, tensors)[0])
    del out
    record: dict[str, Any] = {
        "case": case.to_dict(),
        "pass": which,
        "peak_bytes": peak,
        "output_bytes": case.tensor_bytes,
        "checks": [asdict(check) for check in checks],
        "beside": {},
    }
    rows = tensors.view(case.batch, case.length, case.heads * case.head_dim)
    for peer in peers:
        if peer.attend is not None:
            try:
                record["beside"][peer.name] = _peak(machine, peer.attend(case), rows, which)[0]
            except torch.OutOfMemoryError:
                record["beside"][peer.name] = None
    return record


def _peak(machine: Machine, attend: Attend, tensors: Tensors, which: str) -> tuple[int, torch.Tensor]:
    leaves = [x.detach().requires_grad_(which == "forward_backward") for x in tensors.all[:3]]
    machine.release()
    machine.finish()
    before = machine.allocated()
    machine.reset_peak()
    out = attend(leaves[0], leaves[1], leaves[2])
    if which == "forward_backward":
        # The gradient given for out counts, so it is made in here.
        torch.autograd.grad(out, leaves, torch.randn_like(out))
    machine.finish()
    return machine.peak() - before, out.detach()


def gigapath(machine: Machine, case: Case, peers: list[Peer], sizes: GpuSizes) -> dict[str, Any]:
    """A slide encoder's shape, forward: seconds of every call, ours and others'.

    Raises:
        CheckFailed: before anything is timed.
    """
    sets = input_sets(machine, case)
    us = rotated([ours(case, tensors) for tensors in sets])
    (out,) = ours(case, sets[0]).passes["forward"]()
    checks = rows_at_size(case, sets[0], out, allowed_at_size(case, sets[0])[0])
    del out
    function = us.passes["forward"]
    record = {
        "case": case.to_dict(),
        "pass": "forward",
        "checks": [asdict(check) for check in checks],
        "seconds": interleave(machine, {"ours": function}, *sizes.rounds, sizes.budget_seconds)["ours"],
    }
    return record | beside(machine, case, "forward", function, sets, peers, sizes)


def growth(machine: Machine, which: str, sizes: GpuSizes) -> dict[str, Any]:
    """Seconds a call at every length, all lengths in turn in every round, as many calls each as make up the same tokens.

    A device lowers its clock under load within milliseconds: what short and long sequences cost compares only under the
    same load.

    Raises:
        CheckFailed: a length whose result is not the definition's.
    """
    storage = draw(max(sizes.growth, key=lambda case: case.length), 0, machine.device)
    checks, functions, calls = [], {}, {}
    # The longest first: what its results took of the allocator's memory then serves the others.
    for case in sorted(sizes.growth, key=lambda case: -case.length):
        tensors = storage.first(*case.shape)
        calls[str(case.length)] = storage.query.shape[2] // case.length
        functions[str(case.length)] = _repeated(ours(case, tensors).passes[which], calls[str(case.length)])
        (out,) = ours(case, tensors).passes["forward"]()
        checks += rows_at_size(case, tensors, out, allowed_at_size(case, tensors)[0])
        del out
    machine.release()
    least = sizes.rounds[0]
    seconds = interleave(machine, functions, least, least, 0.0)
    return {
        "case": sizes.growth[0].to_dict(),
        "pass": which,
        "lengths": [case.length for case in sizes.growth],
        "checks": [asdict(check) for check in checks],
        "calls": calls,
        "seconds": {length: [one / calls[length] for one in found] for length, found in seconds.items()},
    }


def _repeated(function: Callable[[], object], calls: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(calls):
            function()

    return run


def curves(machine: Machine, which: str, peers: list[Peer], sizes: GpuSizes) -> dict[str, Any]:
    """Time by name and length: ours, torchscale, and dense attention until a call takes too long. For the picture."""
    found: dict[str, dict[str, list[float]]] = {}
    for case in sizes.curves:
        tensors = draw(case, 0, machine.device)
        makers: dict[str, tuple[int, Callable[[], Contender]]] = {
            "longnet": (1, partial(ours, case, tensors)),
            "dense": (2, partial(dense, machine, tensors, case.is_causal)),
        }
        rows = tensors.view(case.batch, case.length, case.heads * case.head_dim)
        for peer in peers:
            # Those that compute the same function.
            if peer.attend is not None and peer.make is not None:
                makers[peer.name] = (1, partial(peer.make, case, rows))
        functions = {
            name: make().passes[which]
            for name, (power, make) in makers.items()
            if _expected(found.get(name, {}), case.length, power) <= sizes.slow_seconds
        }
        for name, seconds in interleave(machine, functions, 3, 3, 0.0).items():
            found.setdefault(name, {})[str(case.length)] = seconds
        machine.release()
    return {"case": sizes.curves[0].to_dict(), "pass": which, "seconds": found}


def _expected(curve: dict[str, list[float]], length: int, power: int) -> float:
    """Seconds expected of what grows with this power of the length; 0 before the first measurement."""
    known = {int(at): statistics.median(seconds) for at, seconds in curve.items()}
    return known[max(known)] * (length / max(known)) ** power if known else 0.0
