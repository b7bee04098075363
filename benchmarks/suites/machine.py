"""What comes before figures mean anything: the gate of a run, noise, a GPU's ceilings, and the time of the import."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import torch

from benchmarks.cases import CPU, CPU_QUICK, DTYPES, GIGAPATH, GPU, GPU_QUICK, Case, Record, draw, variants
from benchmarks.checks import as_json, rows_at_size, small_against_oracle
from benchmarks.environment import child_environment
from benchmarks.run import Run, Suite
from benchmarks.timing import Function, ours

# Half the segments leave enough rows for all branches to be one nest, and 2,500 tokens divide by none of them.
_HALVED = replace(GPU, length=2500, segment_lengths=tuple(w // 2 for w in GPU.segment_lengths))
_ON_CPU = {"cpu": variants(CPU, dtype=DTYPES), "cpu-quick": variants(CPU_QUICK, dtype=DTYPES)}
_ON_GPU = (*variants(_HALVED, head_dim=(64, 128), is_causal=(True, False)), replace(GIGAPATH, length=2500))
_ORACLE = {name: tuple(case.small() for case in cases) for name, cases in _ON_CPU.items()}
# For cards on which no kernel has run: several head dimensions and types, a length that no segment divides, little memory.
_ODD = replace(GPU_QUICK, length=600)
_QUICK = (*variants(_ODD, head_dim=(64, 128), is_causal=(True, False)), replace(_ODD, dtype="float32"))
_ORACLE |= {"cuda": _ON_GPU, "cuda-quick": _QUICK}
# Side of the matrices, bytes of the copy.
_CEILINGS = {"cuda": ((8192, 4 * 2**30),), "cuda-quick": ((256, 2**20),)}
_IMPORT = """
import time
start = time.perf_counter()
import torch
between = time.perf_counter()
import longnet
print(between - start, time.perf_counter() - between)
"""


def check(run: Run, case: Case) -> list[Record]:
    """Small cases of the same structure against the dense float64 oracle."""
    backends = ("cpu_flash", "portable") if run.device.kind == "cpu" else ("portable",)
    return as_json(small_against_oracle(case, run.device.device, backends))


def noise(run: Run, case: Case) -> Record:
    """The same call as two contenders: what a ratio of 1 looks like on this machine today."""
    tensors = draw(case)
    functions = {name: ours(case, tensors).passes["forward"] for name in ("first", "second")}
    checks = rows_at_size(case, tensors, functions["first"]()[0])
    rounds = (run.effort.noise_rounds, run.effort.noise_rounds)
    return {"case": case.to_dict(), "checks": as_json(checks), "seconds": run.time(functions, rounds)}


def ceilings(run: Run, cell: tuple[int, int]) -> Record:
    """What a GPU can do today: a bf16 matrix product of random data, and a copy counted as read plus written."""
    (side, size), device = cell, run.device.device
    one, other = torch.randn(2, side, side, dtype=torch.bfloat16, device=device)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    functions: dict[str, Function] = {"matrix": lambda: torch.mm(one, other), "copy": lambda: target.copy_(source)}
    seconds = {name: run.time({name: function}, (20, 20))[name] for name, function in functions.items()}
    return {"matrix_side": side, "matrix_flops": 2 * side**3, "copy_bytes": 2 * size, "seconds": seconds}


def import_time(run: Run, repetitions: int) -> Record:
    """Seconds of ``import torch``, then longnet, in fresh processes; one more before them writes the byte code."""
    command, environ = [sys.executable, "-c", _IMPORT], child_environment()
    pairs = []
    for _ in range(repetitions + 1):
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
        pairs.append([float(seconds) for seconds in done.stdout.split()])
    return {
        "torch_seconds": [torch for torch, _ in pairs[1:]],
        "longnet_seconds": [longnet for _, longnet in pairs[1:]],
    }


CHECKS = Suite("checks", _ORACLE, check)
NOISE = Suite("noise", _ON_CPU, noise)
CEILINGS = Suite("ceilings", _CEILINGS, ceilings, single=True)
IMPORT = Suite("import", {"cpu": (7,), "cpu-quick": (1,)}, import_time, {"cpu": {"import_seconds": 0.2}}, single=True)
