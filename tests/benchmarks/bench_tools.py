"""What the benchmark's tests share: running a command, and a machine that is this CPU."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import cli
from benchmarks.gpu import cases, runner

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True)
class Done:
    exit_code: int
    stdout: str
    stderr: str


def run(*arguments: object) -> Done:
    """The command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as left:
            code = int(left.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


class CpuMachine:
    """This CPU in a GPU's place: the clock is the host's, memory is what the test says it is."""

    def __init__(self, fits_bytes: float = float("inf")) -> None:
        self.device = torch.device("cpu")
        self.cache_bytes = 1 << 18
        self.fits_bytes = fits_bytes
        self.marks = 0

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "cuda",
            "model": "a CPU in its place",
            "capability": "0.0",
            "multiprocessors": 1,
            "memory_bytes": 1 << 34,
            "cache_bytes": self.cache_bytes,
        }

    def mark(self) -> float:
        self.marks += 1
        return time.perf_counter()

    def seconds(self, start: float, stop: float) -> float:
        return stop - start

    def finish(self) -> None:
        return None

    def occupy(self) -> None:
        return None

    def capture(self, function: Callable[[], object]) -> Callable[[], None]:
        def replay() -> None:
            function()

        return replay

    def release(self) -> None:
        # A collection of all that the tests imported takes a fifth of a second, and a run makes dozens.
        return None

    def allocated(self) -> int:
        return 1000

    def reset_peak(self) -> None:
        return None

    def peak(self) -> int:
        return 1000 + 2**30

    def attend(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Any, ...]:
        return tuple(_flash(query, key, value, 0.0, is_causal))

    def attend_backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, saved: tuple[Any, ...], is_causal: bool
    ) -> tuple[Tensor, ...]:
        return tuple(_flash_backward(grad_out, query, key, value, *saved, 0.0, is_causal))


def measure(sections: tuple[str, ...] = cases.SECTIONS) -> dict[str, Any]:
    """A quick GPU run of these sections on this CPU, as JSON would give it back."""
    sizes = replace(cases.QUICK, longest_seconds=0.0)
    benchmark = runner.GpuBenchmark(CpuMachine(), sizes, sections, compile_kernels=lambda cases, memory: 0)
    for step in benchmark.steps():
        step.run()
    found: dict[str, Any] = json.loads(json.dumps(benchmark.result))
    return found
