"""What ``import longnet`` takes beyond ``import torch``."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.cases import Record
from benchmarks.environment import child_environment
from benchmarks.run import Run, Suite

_PROGRAM = """
import time
start = time.perf_counter()
import torch
between = time.perf_counter()
import longnet
print(between - start, time.perf_counter() - between)
"""


def measure(run: Run, repetitions: int) -> Record:
    """Seconds in fresh processes, torch first, then longnet; one more process before them writes the byte code."""
    command, environ = [sys.executable, "-c", _PROGRAM], child_environment()
    pairs = []
    for _ in range(repetitions + 1):
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
        pairs.append(tuple(map(float, done.stdout.split())))
    return {
        "torch_seconds": [torch for torch, _ in pairs[1:]],
        "longnet_seconds": [longnet for _, longnet in pairs[1:]],
    }


SUITE = Suite("import", {"cpu": (7,), "cpu-quick": (1,)}, measure, {"cpu": {"import_seconds": 0.2}}, single=True)
