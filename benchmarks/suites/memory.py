"""Peak memory beyond the inputs: of tensors on a GPU, of a fresh process on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import CPU, CPU_QUICK, GPU, GPU_QUICK, PASSES, Call, Case, Record, Tensors, draw, grid, lengths_of
from benchmarks.checks import Attend, as_json, attend_dilated, rows_at_size
from benchmarks.contenders import ours
from benchmarks.device import Cpu, Device
from benchmarks.environment import in_child
from benchmarks.run import Run, Suite


def _cells(*cases: Case, dtypes: tuple[str, ...] = ("bfloat16",)) -> tuple[Call, ...]:
    sizes = [(dtype, which, case) for dtype in dtypes for which in PASSES for case in cases]
    return tuple(Call(replace(case, dtype=dtype), which) for dtype, which, case in sizes)


CELLS = {
    "cpu": _cells(*lengths_of(CPU, 8192, 32768, 131072), dtypes=("float32", "bfloat16")),
    "cpu-quick": _cells(CPU_QUICK, dtypes=("float32", "bfloat16")),
    "cuda": tuple(Call(case, which) for case in grid(GPU, (1048576,)) for which in PASSES),
    "cuda-quick": _cells(GPU_QUICK),
}
# On a CPU in sizes of the output, on a GPU in bytes.
LIMITS: dict[str, dict[str, Any]] = {
    "cpu": {"forward": {"float32": 2.5, "bfloat16": 4.0}, "forward_backward": {"float32": 7.0, "bfloat16": 7.0}},
    "cuda": {"forward": 2.2 * 2**30, "forward_backward": 10.5 * 2**30},
}


def measure(run: Run, call: Call) -> Record:
    """On a GPU the most that torch's allocator held, with peers beside it; on a CPU see :func:`_in_processes`.

    Raises:
        CheckFailed: the result measured is not the definition's.
    """
    case, which = call
    if not run.device.counts_tensors:
        # Long sequences take long and vary little: what malloc holds is bounded.
        return _in_processes(case, which, 3 if run.effort.judged and case.length <= 32768 else 1)
    tensors = draw(case, 0, run.device.device)
    peak, out = _peak(run.device, _call(attend_dilated(case), tensors, which))
    checks = rows_at_size(case, tensors, out[0])
    del out
    others: dict[str, int | None] = {}
    rows = tensors.view(case.batch, case.length, case.heads * case.head_dim)
    for peer in run.peers:
        if peer.attend is not None:
            try:
                others[peer.name] = _peak(run.device, _call(peer.attend(case), rows, which))[0]
            except torch.OutOfMemoryError:
                others[peer.name] = None
    return {
        "case": case.to_dict(), "pass": which, "peak_bytes": peak, "output_bytes": case.tensor_bytes,
        "checks": as_json(checks), "beside": others,
    }  # fmt: skip


def _call(attend: Attend, tensors: Tensors, which: str) -> Callable[[], tuple[Tensor, ...]]:
    leaves = [x.detach().requires_grad_(which == "forward_backward") for x in tensors.inputs]

    def run() -> tuple[Tensor, ...]:
        out = attend(leaves[0], leaves[1], leaves[2])
        if which == "forward_backward":
            # The gradient given for out counts, so it is made in here.
            torch.autograd.grad(out, leaves, torch.randn_like(out))
        return (out.detach(),)

    return run


def _peak(device: Device, call: Callable[[], tuple[Tensor, ...]]) -> tuple[int, tuple[Tensor, ...]]:
    """Most bytes beyond those in use before the call, and its results."""
    device.release()
    device.finish()
    before = device.allocated()
    device.reset_peak()
    results = call()
    device.finish()
    return device.peak() - before, results


def _in_processes(case: Case, which: str, processes: int) -> Record:
    """Peaks of :func:`probe`, each in a process of its own.

    ``peak_bytes`` is what is resident with malloc's defaults, which hold some of what was freed and differ from process to
    process. ``live_peak_bytes`` is from one more process whose malloc maps every block from 64 KiB up by itself and so
    returns it when it is freed: what the call holds at once.
    """
    records = [in_child(probe, Call(case, which)) for _ in range(processes)]
    live = in_child(probe, Call(case, which), MALLOC_MMAP_THRESHOLD_="65536")
    peaks = [record.pop("peak_bytes") for record in records]
    return {**records[0], "peak_bytes": peaks, "live_peak_bytes": live["peak_bytes"]}


def probe(call: Call) -> Record:
    """Peak resident bytes of one call beyond q, k, v (and, for the backward pass, the gradient given for out).

    A call on fewer heads and at most one longest segment first, so that libraries loaded on first use and the buffers
    that they hold for good (matrix products of this size have their own) do not count. The result itself counts.
    """
    case, which = call
    heads, length = min(case.heads, max(case.dilation_rates)), min(case.length, max(case.segment_lengths))
    warm = replace(case, heads=heads, length=length)
    ours(warm, draw(warm)).passes[which]()
    tensors = draw(case)
    peak, results = _peak(Cpu(), ours(case, tensors).passes[which])
    return {
        "case": case.to_dict(), "pass": which, "peak_bytes": peak, "output_bytes": results[0].nbytes,
        "grad_out_bytes": tensors.grad_out.nbytes if which == "forward_backward" else 0,
        "checks": as_json(rows_at_size(case, tensors, results[0])),
    }  # fmt: skip


SUITE = Suite("memory", CELLS, measure, {kind: {"memory": limits} for kind, limits in LIMITS.items()})
