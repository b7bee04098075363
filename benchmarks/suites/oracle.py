"""The gate of a run: small cases of the same structure against the dense float64 oracle."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.cases import CPU, CPU_QUICK, GIGAPATH, GPU, GPU_QUICK, Case, Record, both_dtypes, grid
from benchmarks.checks import as_json, small_against_oracle
from benchmarks.run import Run, Suite

# Half the segments leave enough rows for all branches to be one nest, and 2,500 tokens divide by none of them.
_HALVED = replace(GPU, length=2500, segment_lengths=tuple(w // 2 for w in GPU.segment_lengths))
CELLS = {
    "cpu": both_dtypes(CPU.small()),
    "cpu-quick": both_dtypes(CPU_QUICK.small()),
    "cuda": (*grid(_HALVED, (2500,), (64, 128)), replace(GIGAPATH, length=2500)),
    "cuda-quick": (GPU_QUICK,),
}
_BACKENDS = {"cpu": ("cpu_flash", "portable"), "cuda": ("portable",)}


def measure(run: Run, case: Case) -> list[Record]:
    return as_json(small_against_oracle(case, run.device.device, _BACKENDS[run.device.kind]))


SUITE = Suite("checks", CELLS, measure)
