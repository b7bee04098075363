"""Time against the same-FLOP kernel (or dense attention), and beside other implementations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import PASSES, Case, Tensors, draw
from benchmarks.checks import Check, allowed_at_size, compare, rows_at_size, window_at_size
from benchmarks.contenders import Contender, ours
from benchmarks.gpu.cases import GpuSizes
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.timing import interleave, rotated, wall, warm_up
from benchmarks.gpu.visited import visited_share
from benchmarks.peers import Peer

# Inputs that together are so many times the size of the device's cache.
_CACHES = 4
_MOST_COPIES = 16
_WALL_SECONDS = 0.01


def reference_kind(case: Case) -> str:
    """What a case is compared with: dense attention over the whole sequence where that is short, see :func:`reference`."""
    return "dense" if case.length < max(case.segment_lengths) else "same_flop"


def reference_ratio(case: Case) -> float:
    """What the reference's time is multiplied by."""
    return float(case.flop_ratio) if reference_kind(case) == "same_flop" else 1.0


def reference(machine: Machine, case: Case, tensors: Tensors) -> Contender:
    """torch's fastest dense attention, bare, on the same random numbers.

    As (blocks, H, block, D), one block as long as the rows of a segment: what dilation would cost if reading strided rows
    and mixing were free, its time to be scaled by ``case.flop_ratio``. Short sequences: as (B, H, N, D).
    """
    if reference_kind(case) == "same_flop":
        tensors = tensors.first(case.batch * case.blocks, case.heads, case.block, case.head_dim)
    return dense(machine, tensors, case.is_causal, reference_kind(case))


def dense(machine: Machine, tensors: Tensors, is_causal: bool, name: str = "dense") -> Contender:
    """Dense attention on (B, H, N, D), forward and backward called without autograd."""
    query, key, value, grad_out = tensors.all

    def forward() -> tuple[Tensor, ...]:
        return machine.attend(query, key, value, is_causal)[:1]

    def forward_backward() -> tuple[Tensor, ...]:
        saved = machine.attend(query, key, value, is_causal)
        return (saved[0], *machine.attend_backward(grad_out, query, key, value, saved, is_causal))

    return Contender(name, {"forward": forward, "forward_backward": forward_backward})


def input_sets(machine: Machine, case: Case) -> list[Tensors]:
    """Enough different inputs that none is still in the cache when its turn comes again."""
    copies = min(_MOST_COPIES, max(1, math.ceil(_CACHES * machine.cache_bytes / (4 * case.tensor_bytes))))
    return [draw(case, seed, machine.device) for seed in range(copies)]


def speed(machine: Machine, case: Case, peers: list[Peer], sizes: GpuSizes) -> list[dict[str, Any]]:
    """Seconds of every call of one case: a record for each pass.

    Raises:
        CheckFailed: before anything is timed, see :mod:`benchmarks.checks`.
    """
    sets = input_sets(machine, case)
    us = rotated([ours(case, tensors) for tensors in sets])
    base = rotated([reference(machine, case, tensors) for tensors in sets])
    checks = gate(case, sets[0])
    machine.release()
    records = []
    for which in PASSES:
        judged = {base.name: base.passes[which], "ours": us.passes[which]}
        record: dict[str, Any] = {
            "case": case.to_dict(),
            "pass": which,
            "reference": base.name,
            "ratio": reference_ratio(case),
            "visited": visited_share(case),
            "input_sets": len(sets),
            "checks": [asdict(check) for check in checks],
            "judged": interleave(machine, judged, *sizes.rounds, sizes.budget_seconds),
        }
        expected = sum(min(seconds) for seconds in record["judged"].values())
        if expected < _WALL_SECONDS:
            record["wall"] = {name: wall(machine, function) for name, function in judged.items()}
        records.append(record | beside(machine, case, which, us.passes[which], sets, peers, sizes))
        machine.release()
    return records


def gate(case: Case, tensors: Tensors) -> list[Check]:
    """Rows anywhere, a whole window with its gradients, and that the forward alone gives the same."""
    us = ours(case, tensors)
    allowed = allowed_at_size(case, tensors)
    got = us.passes["forward_backward"]()
    found = rows_at_size(case, tensors, got[0], allowed[0])
    found += window_at_size(case, tensors, got, allowed)
    return found + compare(f"forward alone, {case}", us.passes["forward"](), got, allowed)


def beside(
    machine: Machine,
    case: Case,
    which: str,
    us: Callable[[], object],
    sets: list[Tensors],
    peers: list[Peer],
    sizes: GpuSizes,
) -> dict[str, Any]:
    """Other implementations, with ours once more, in rounds of their own; and why one is left out."""
    functions: dict[str, Callable[[], object]] = {}
    left_out = {}
    for peer in peers:
        if peer.make is None:
            continue
        refusal = peer.refuses(case)
        if refusal is None:
            try:
                rows = [tensors.view(case.batch, case.length, case.heads * case.head_dim) for tensors in sets]
                function = rotated([peer.make(case, one) for one in rows]).passes[which]
                warm_up(machine, function)
                functions[peer.name] = function
            except torch.OutOfMemoryError:
                refusal = "out of memory"
        if refusal is not None:
            left_out[peer.name] = refusal
        machine.release()
    found: dict[str, list[float]] = {}
    if functions:
        rounds = sizes.peer_rounds
        try:
            found = interleave(machine, {"ours": us, **functions}, rounds, rounds, 0.0)
        except torch.OutOfMemoryError:
            left_out |= dict.fromkeys(functions, "out of memory in turn with longnet")
    return {"beside": found, "left_out": left_out}
