"""The longest single sequence that fits."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.cases import Case, Tensors, draw
from benchmarks.checks import Check, allowed_at_size, rows_at_size
from benchmarks.contenders import ours
from benchmarks.gpu.cases import GpuSizes
from benchmarks.gpu.machine import Machine


def longest(machine: Machine, which: str, sizes: GpuSizes) -> dict[str, Any]:
    """Doubling from a length that fits until memory ends, then halving the gap down to ``sizes.longest_step`` tokens.

    q, k, v, out (and for a backward pass its gradient and three gradients) are held, as at the end of a call. When time
    is up the search stops: ``fails_at`` is then further above ``length`` than a step.

    Raises:
        CheckFailed: a result that is not the definition's, at any length tried.
        RuntimeError: not even the first length fits.
    """
    stop_at = time.monotonic() + sizes.longest_seconds
    step = sizes.longest_step
    tried: list[dict[str, Any]] = []
    checks: list[Check] = []

    def fits(length: int) -> bool:
        case = replace(sizes.longest, length=length)
        start = time.monotonic()
        found = _run(machine, case, which)
        machine.release()
        tried.append({"length": length, "fits": found is not None, "seconds": time.monotonic() - start})
        checks.extend(found or ())
        return found is not None

    low, high = sizes.longest.length, None
    if not fits(low):
        raise RuntimeError(f"{sizes.longest} does not fit into this device's memory: {which}")
    while time.monotonic() < stop_at:
        if high is None:
            middle = 2 * low
        elif high - low <= step:
            break
        else:
            middle = low + max(1, (high - low) // (2 * step)) * step
        if fits(middle):
            low = middle
        else:
            high = middle
    return {
        "case": replace(sizes.longest, length=low).to_dict(),
        "pass": which,
        "length": low,
        "fails_at": high,
        "step": step,
        "tried": tried,
        "checks": [asdict(check) for check in checks],
    }


def _run(machine: Machine, case: Case, which: str) -> list[Check] | None:
    """One call and its check, or None where memory ends. Nothing of a failed call outlives it."""
    try:
        tensors = _draw(case, which, machine)
        result = ours(case, tensors).passes[which]()
        machine.finish()
        out = result[0].detach()
        del result
        return rows_at_size(case, tensors, out, allowed_at_size(case, tensors)[0])
    except torch.OutOfMemoryError:
        return None


def _draw(case: Case, which: str, machine: Machine) -> Tensors:
    if which == "forward_backward":
        return draw(case, 0, machine.device)
    # A forward needs no gradient; the check of the one block on which errors are judged does.
    generator = torch.Generator(machine.device).manual_seed(0)
    query, key, value = (
        torch.randn(case.shape, dtype=case.torch_dtype, device=machine.device, generator=generator) for _ in range(3)
    )
    block = replace(case, length=case.block)
    return Tensors(query, key, value, draw(block, 1, machine.device).grad_out)
