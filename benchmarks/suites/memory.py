"""Peak memory beyond the inputs, of tensors on a GPU and of a fresh process on a CPU; the longest sequence on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import CPU, CPU_QUICK, DTYPES, GPU, GPU_QUICK, PASSES, Call, Case, Record, Tensors, draw, variants
from benchmarks.checks import Attend, Check, as_json, attend_dilated, rows_at_size
from benchmarks.device import Cpu, Device
from benchmarks.environment import in_child
from benchmarks.run import Run, Suite
from benchmarks.timing import ours


def _cells(base: Case, lengths: tuple[int, ...]) -> tuple[Call, ...]:
    sizes = [(dtype, which) for dtype in DTYPES for which in PASSES]
    return tuple(Call(x, which) for dtype, which in sizes for x in variants(base, length=lengths, dtype=(dtype,)))


CELLS = {
    "cpu": _cells(CPU, (8192, 32768, 131072)),
    "cpu-quick": _cells(CPU_QUICK, (CPU_QUICK.length,)),
    "cuda": tuple(Call(case, which) for case in variants(GPU, is_causal=(True, False)) for which in PASSES),
    "cuda-quick": tuple(Call(GPU_QUICK, which) for which in PASSES),
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


@dataclass(frozen=True)
class Search:
    """From a case that fits to the longest one, to ``step`` tokens; stops after ``seconds``."""

    case: Case
    which: str
    step: int
    seconds: float

    @property
    def cases(self) -> tuple[Case, ...]:
        # Beyond 2**31 elements strides are wider integers, which are other kernels.
        return variants(self.case, length=(self.case.length, 2 * self.case.length))

    @property
    def label(self) -> str:
        return self.which


LONGEST_CELLS = {
    "cuda": tuple(Search(GPU, which, 65536, 90.0) for which in PASSES),
    "cuda-quick": tuple(Search(GPU_QUICK, which, 65536, 1.0) for which in PASSES),
}


def longest(run: Run, search: Search) -> Record:
    """Doubling from a length that fits until memory ends, then halving the gap down to a step.

    q, k, v, out (and for a backward pass its gradient and three gradients) are held, as at the end of a call. When time
    is up the search stops: ``fails_at`` is then further above ``length`` than a step.

    Raises:
        CheckFailed: a result that is not the definition's, at any length tried.
        RuntimeError: not even the first length fits.
    """
    stop_at = time.monotonic() + search.seconds
    tried: list[Record] = []
    checks: list[Check] = []

    def fits(length: int) -> bool:
        start = time.monotonic()
        passed = _run(run.device, replace(search.case, length=length), search.which)
        run.device.release()
        tried.append({"length": length, "fits": passed is not None, "seconds": time.monotonic() - start})
        checks.extend(passed or ())
        return passed is not None

    step, low, high = search.step, search.case.length, None
    if not fits(low):
        raise RuntimeError(f"{search.case} does not fit into this device's memory: {search.which}")
    while time.monotonic() < stop_at and (high is None or high - low > step):
        middle = 2 * low if high is None else low + max(1, (high - low) // (2 * step)) * step
        if fits(middle):
            low = middle
        else:
            high = middle
    return {
        "case": replace(search.case, length=low).to_dict(), "pass": search.which, "length": low, "fails_at": high,
        "step": step, "tried": tried, "checks": as_json(checks),
    }  # fmt: skip


def _run(device: Device, case: Case, which: str) -> list[Check] | None:
    """One call and its check, or None where memory ends. Nothing of a failed call outlives it."""
    try:
        tensors = _draw(case, which, device)
        result = ours(case, tensors).passes[which]()
        device.finish()
        out = result[0].detach()
        del result
        return rows_at_size(case, tensors, out)
    except torch.OutOfMemoryError:
        return None


def _draw(case: Case, which: str, device: Device) -> Tensors:
    if which == "forward_backward":
        return draw(case, 0, device.device)
    # A forward needs no gradient; the check of the one block on which errors are judged does.
    generator = torch.Generator(device.device).manual_seed(0)
    query, key, value = (
        torch.randn(case.shape, generator=generator, dtype=case.torch_dtype, device=device.device) for _ in range(3)
    )
    return Tensors(query, key, value, draw(replace(case, length=case.block), 1, device.device).grad_out)


SUITE = Suite("memory", CELLS, measure, {kind: {"memory": limits} for kind, limits in LIMITS.items()})
LONGEST = Suite("longest", LONGEST_CELLS, longest)
