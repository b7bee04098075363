"""Time against the same-FLOP kernel (on a GPU, at short lengths, dense attention), and beside other implementations."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from benchmarks import cases
from benchmarks.cases import DTYPES, GPU_QUICK, PASSES, Case, Record, Tensors, draw, variants
from benchmarks.checks import Check, allowed_at_size, as_json, compare, rows_at_size, window_at_size
from benchmarks.device import Device
from benchmarks.run import Run, Suite
from benchmarks.timing import (
    Contender,
    Function,
    dense,
    host_seconds,
    ours,
    reference,
    reference_ratio,
    rotated,
    warm_up,
)
from benchmarks.visited import visited_share

CELLS = {
    "cpu": variants(cases.CPU, length=(8192, 32768), dtype=DTYPES),
    "cpu-quick": variants(cases.CPU_QUICK, dtype=DTYPES),
    "cuda": variants(cases.GPU, length=(8192, 32768, 131072, 1048576), head_dim=(64, 128), is_causal=(True, False)),
    "cuda-quick": variants(GPU_QUICK, length=(128, 512)),
}
# The shape of a slide encoder's attention, at lengths that no segment divides.
GIGAPATH_CELLS = {
    "cuda": variants(cases.GIGAPATH, length=(10001, 45681)),
    "cuda-quick": (replace(GPU_QUICK, length=301, head_dim=48, dtype="float16", is_causal=False),),
}
_LONG, _ONCE, _BOTH = (131072, 1048576), ("forward",), ("forward_backward",)


def _limit(kind: str, length: tuple[int, ...], head_dim: tuple[int, ...], which: tuple[str, ...], limit: float) -> Any:
    entry = {"kind": kind, "length": length, "head_dim": head_dim, "pass": which, "limit": limit}
    return {"is_causal": (True,)} | entry if kind == "torchscale" else entry


# "tax": time over the same-FLOP kernel's, at most. "dense": time over dense cuDNN attention's, at most. "torchscale":
# torchscale's time over ours, at least. A limit holds for the cells whose fields are all in its lists.
LIMITS: dict[str, dict[str, Any]] = {
    "cpu": {"speed": {"forward": 1.15, "forward_backward": 1.25}},
    "cuda": {
        "speed": [
            _limit("tax", _LONG, (64,), _ONCE, 1.00),
            _limit("tax", _LONG, (128,), _ONCE, 1.05),
            _limit("tax", (32768,), (64, 128), _ONCE, 1.10),
            _limit("tax", _LONG, (64, 128), _BOTH, 1.05),
            _limit("dense", (8192,), (64,), _BOTH, 1.00),
            _limit("torchscale", _LONG, (64,), _ONCE, 5.5),
            _limit("torchscale", _LONG, (128,), _ONCE, 7.0),
            _limit("torchscale", (32768,), (64, 128), _ONCE, 6.0),
            _limit("torchscale", _LONG, (64,), _BOTH, 3.8),
            _limit("torchscale", _LONG, (128,), _BOTH, 4.5),
        ]
    },
}
# The size of all inputs together, in sizes of the device's cache; copies at most; seconds of a round that is timed by
# the host's clock too.
_CACHES, _MOST_COPIES, _SHORT_SECONDS = 4, 16, 0.01


def measure(run: Run, case: Case) -> list[Record]:
    """Seconds of every call: a record for each pass. The judged pair runs alone; others have rounds of their own.

    Raises:
        CheckFailed: before anything is timed, see :mod:`benchmarks.checks`.
    """
    device, on_gpu, records = run.device, run.device.kind == "cuda", []
    sets = input_sets(device, case)
    us = rotated([ours(case, tensors) for tensors in sets])
    base = rotated([reference(device, case, tensors) for tensors in sets])
    others = [] if on_gpu else [ours(case, sets[0].tokens_first(), "ours_tokens_first"), dense(device, case, sets[0])]
    checks = gate(case, sets[0], others[:1])
    device.release()
    for which in PASSES:
        judged = {base.name: base.passes[which], "ours": us.passes[which]}
        seconds = run.time(judged)
        record: Record = {
            "case": case.to_dict(), "pass": which, "reference": base.name, "ratio": reference_ratio(device, case),
            "input_sets": len(sets), "checks": as_json(checks), "judged": seconds,
        }  # fmt: skip
        if on_gpu:
            record["visited"] = visited_share(case)
        if device.queues and sum(min(one) for one in seconds.values()) < _SHORT_SECONDS:
            record["wall"] = {name: host_seconds(device, function, 20) for name, function in judged.items()}
        first = us if on_gpu else base
        functions = {one.name: one.passes[which] for one in (first, *others)}
        expected = statistics.median(seconds["ours"]) * float(case.dense_ratio)
        left_out = {}
        if "dense" in functions and expected > run.effort.slow_seconds:
            del functions["dense"]
            left_out["dense"] = f"about {expected:.0f} s a call expected"
        record |= beside(run, case, which, functions, sets)
        record["left_out"] |= left_out
        records.append(record)
        device.release()
    return records


def input_sets(device: Device, case: Case) -> list[Tensors]:
    """Enough different inputs that none is still in the cache when its turn comes again."""
    copies = min(_MOST_COPIES, max(1, math.ceil(_CACHES * device.cache_bytes / (4 * case.tensor_bytes))))
    return [draw(case, seed, device.device) for seed in range(copies)]


def gate(case: Case, tensors: Tensors, others: list[Contender]) -> list[Check]:
    """Rows anywhere, a whole window with its gradients; the forward alone and other memory layouts give the same."""
    us, allowed = ours(case, tensors), allowed_at_size(case, tensors)
    got = us.passes["forward_backward"]()
    checks = rows_at_size(case, tensors, got[0], allowed[0])
    checks += window_at_size(case, tensors, got, allowed)
    checks += compare(f"forward alone, {case}", us.passes["forward"](), got, allowed)
    for other in others:
        checks += compare(f"(B, N, H, D) memory, {case}", other.passes["forward_backward"](), got, allowed)
    return checks


def beside(run: Run, case: Case, which: str, first: Mapping[str, Function], sets: list[Tensors]) -> Record:
    """``first`` once more, now with other implementations, in rounds of their own; and why one is left out."""
    peers: dict[str, Function] = {}
    left_out = {}
    for peer in run.peers:
        if peer.make is None:
            continue
        refusal = peer.refuses(case)
        if refusal is None:
            try:
                rows = [tensors.view(case.batch, case.length, case.heads * case.head_dim) for tensors in sets]
                function = rotated([peer.make(case, one) for one in rows]).passes[which]
                warm_up(run.device, function)
                peers[peer.name] = function
            except torch.OutOfMemoryError:
                refusal = "out of memory"
        if refusal is not None:
            left_out[peer.name] = refusal
        run.device.release()
    seconds: dict[str, list[float]] = {}
    if len(first) + len(peers) > 1:
        try:
            seconds = run.time({**first, **peers}, run.effort.beside_rounds)
        except torch.OutOfMemoryError:
            left_out |= dict.fromkeys(peers, "out of memory in turn with longnet")
    return {"beside": seconds, "left_out": left_out}


def gigapath(run: Run, case: Case) -> Record:
    """A forward pass beside other implementations; torchscale's time over ours has a limit."""
    sets = input_sets(run.device, case)
    functions = {"ours": rotated([ours(case, tensors) for tensors in sets]).passes["forward"]}
    checks = rows_at_size(case, sets[0], ours(case, sets[0]).passes["forward"]()[0])
    seconds = run.time(functions)["ours"]
    record = {"case": case.to_dict(), "pass": "forward", "checks": as_json(checks), "seconds": seconds}
    return record | beside(run, case, "forward", functions, sets)


SUITE = Suite("speed", CELLS, measure, LIMITS)
GIGAPATH_SUITE = Suite("gigapath", GIGAPATH_CELLS, gigapath, {"cuda": {"gigapath": 3.0}})
