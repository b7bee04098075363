"""Time per token from short to long, and the curves of dense attention and peers beside it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from benchmarks.cases import CPU, CPU_QUICK, DTYPES, GPU, GPU_QUICK, PASSES, Case, Record, draw, variants
from benchmarks.checks import as_json, rows_at_size
from benchmarks.run import Run, Suite
from benchmarks.timing import Contender, dense, ours, repeated


@dataclass(frozen=True)
class Series:
    """One case at several lengths, from short to long."""

    cases: tuple[Case, ...]
    which: str

    @property
    def label(self) -> str:
        return f"{self.cases[0]} to N={self.cases[-1].length} {self.which}"


def _on_cpu(base: Case, lengths: Sequence[int]) -> tuple[Series, ...]:
    return tuple(Series(variants(base, dtype=(dtype,), length=lengths), "forward") for dtype in DTYPES)


def _on_gpu(base: Case, lengths: Sequence[int]) -> tuple[Series, ...]:
    return tuple(Series(variants(base, length=lengths), which) for which in PASSES)


_CPU = {"cpu": _on_cpu(CPU, [8192 * 2**i for i in range(6)]), "cpu-quick": _on_cpu(CPU_QUICK, [256, 512])}
# Eight heads, so that 16M tokens fit: the same heads at every length, or they would not be comparable.
_EIGHT = replace(GPU, heads=8)
CELLS = _CPU | {"cuda": _on_gpu(_EIGHT, [2**i for i in range(17, 25)]), "cuda-quick": _on_gpu(GPU_QUICK, [512, 1024])}
CURVES = _CPU | {"cuda": _on_gpu(GPU, [2**i for i in range(13, 21)]), "cuda-quick": _on_gpu(GPU_QUICK, [256, 512])}


def measure(run: Run, series: Series) -> Record:
    """Seconds a call at every length, all lengths in turn in every round.

    On a GPU as many calls each as make up the same tokens: it lowers its clock under load within milliseconds, so short and
    long sequences compare only under the same load.

    Raises:
        CheckFailed: a length whose result is not the definition's.
    """
    most = series.cases[-1].length
    storage = draw(series.cases[-1], 0, run.device.device)
    checks, functions, calls = [], {}, {}
    # The longest first: the allocator's memory for its results then serves the others.
    for case in reversed(series.cases):
        name, tensors = str(case.length), storage.first(*case.shape)
        calls[name] = most // case.length if run.device.queues else 1
        functions[name] = repeated(ours(case, tensors).passes[series.which], calls[name])
        checks += rows_at_size(case, tensors, ours(case, tensors).passes["forward"]()[0])
    run.device.release()
    seconds = run.time(functions, (run.effort.growth_rounds, run.effort.growth_rounds))
    return {
        "case": series.cases[0].to_dict(), "pass": series.which, "lengths": [case.length for case in series.cases],
        "checks": as_json(checks), "calls": calls,
        "seconds": {length: [one / calls[length] for one in times] for length, times in seconds.items()},
    }  # fmt: skip


def curves(run: Run, series: Series) -> Record:
    """Time by name and length: ours, dense attention and the same function by others, each until a call takes too long."""
    timed: dict[str, dict[str, list[float]]] = {}
    for case in series.cases:
        tensors = draw(case, 0, run.device.device)
        makers: dict[str, Callable[[], Contender]] = {
            "longnet": partial(ours, case, tensors),
            "dense": partial(dense, run.device, case, tensors),
        }
        rows = tensors.view(case.batch, case.length, case.heads * case.head_dim)
        makers |= {
            p.name: partial(p.make, case, rows) for p in run.peers if p.make is not None and p.attend is not None
        }
        functions = {}
        for name, make in makers.items():
            expected = _expected(timed.get(name, {}), case.length, 2 if name == "dense" else 1)
            if name == "longnet" or expected <= run.effort.curve_seconds:
                functions[name] = make().passes[series.which]
        for name, seconds in run.time(functions, (run.effort.curve_rounds, run.effort.curve_rounds)).items():
            timed.setdefault(name, {})[str(case.length)] = seconds
        run.device.release()
    return {"case": series.cases[0].to_dict(), "pass": series.which, "seconds": timed}


def _expected(curve: dict[str, list[float]], length: int, power: int) -> float:
    """Seconds expected of what grows with this power of the length; 0 before the first measurement."""
    known = {int(at): statistics.median(seconds) for at, seconds in curve.items()}
    return known[max(known)] * (length / max(known)) ** power if known else 0.0


# The largest time per token over the smallest, less 1, at most.
SUITE = Suite("growth", CELLS, measure, {"cpu": {"growth": 0.20}, "cuda": {"growth": 0.05}})
CURVES_SUITE = Suite("curves", CURVES, curves)
