"""The longest single sequence that fits on a GPU."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from benchmarks.cases import GPU, GPU_QUICK, PASSES, Case, Record, Tensors, draw, lengths_of
from benchmarks.checks import Check, as_json, rows_at_size
from benchmarks.contenders import ours
from benchmarks.device import Device
from benchmarks.run import Run, Suite


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
        return lengths_of(self.case, self.case.length, 2 * self.case.length)

    @property
    def label(self) -> str:
        return self.which


CELLS = {
    "cuda": tuple(Search(GPU, which, 65536, 90.0) for which in PASSES),
    "cuda-quick": tuple(Search(GPU_QUICK, which, 65536, 1.0) for which in PASSES),
}


def measure(run: Run, search: Search) -> Record:
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


SUITE = Suite("longest", CELLS, measure)
