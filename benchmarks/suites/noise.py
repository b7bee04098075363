"""The same call as two contenders: what a ratio of 1 looks like on this machine today."""

from __future__ import annotations

from benchmarks.cases import CPU, CPU_QUICK, Case, Record, both_dtypes, draw
from benchmarks.checks import as_json, rows_at_size
from benchmarks.contenders import ours
from benchmarks.run import Run, Suite

CELLS = {"cpu": both_dtypes(CPU), "cpu-quick": both_dtypes(CPU_QUICK)}


def measure(run: Run, case: Case) -> Record:
    tensors = draw(case)
    functions = {name: ours(case, tensors).passes["forward"] for name in ("first", "second")}
    checks = rows_at_size(case, tensors, functions["first"]()[0])
    rounds = (run.effort.noise_rounds, run.effort.noise_rounds)
    return {"case": case.to_dict(), "checks": as_json(checks), "seconds": run.time(functions, rounds)}


SUITE = Suite("noise", CELLS, measure)
