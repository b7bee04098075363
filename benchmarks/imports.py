"""What ``import longnet`` takes beyond ``import torch``."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from benchmarks.environment import child_environment

_PROGRAM = """
import time
start = time.perf_counter()
import torch
between = time.perf_counter()
import longnet
print(between - start, time.perf_counter() - between)
"""


def import_time(repetitions: int) -> dict[str, Any]:
    """Seconds in fresh processes, torch first, then longnet; one more process before them writes the byte code."""
    pairs = [_once() for _ in range(repetitions + 1)][1:]
    return {"torch_seconds": [torch for torch, _ in pairs], "longnet_seconds": [longnet for _, longnet in pairs]}


def _once() -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=child_environment(), capture_output=True, text=True, check=True
    )
    torch, longnet = map(float, done.stdout.split())
    return torch, longnet
