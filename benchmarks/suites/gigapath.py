"""The shape of a slide encoder's attention, forward, at lengths that no segment divides."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.cases import GIGAPATH, GPU_QUICK, Case, Record
from benchmarks.checks import as_json, rows_at_size
from benchmarks.contenders import ours
from benchmarks.run import Run, Suite
from benchmarks.suites.speed import beside, input_sets
from benchmarks.timing import rotated

CELLS = {
    "cuda": (GIGAPATH, replace(GIGAPATH, length=45681)),
    "cuda-quick": (replace(GPU_QUICK, length=301, head_dim=48, dtype="float16", is_causal=False),),
}


def measure(run: Run, case: Case) -> Record:
    sets = input_sets(run.device, case)
    functions = {"ours": rotated([ours(case, tensors) for tensors in sets]).passes["forward"]}
    checks = rows_at_size(case, sets[0], ours(case, sets[0]).passes["forward"]()[0])
    seconds = run.time(functions)["ours"]
    record = {"case": case.to_dict(), "pass": "forward", "checks": as_json(checks), "seconds": seconds}
    return record | beside(run, case, "forward", functions, sets)


# torchscale's time over ours, at least.
SUITE = Suite("gigapath", CELLS, measure, {"cuda": {"gigapath": 3.0}})
