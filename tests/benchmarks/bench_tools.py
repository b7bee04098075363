"""What the benchmark's tests share: running a command, and a machine that is this CPU."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import cli, harness
from benchmarks.device import Cpu


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


class CpuMachine(Cpu):
    """This CPU in a GPU's place: the clock is the host's, memory is what the test says it is."""

    kind, queues, counts_tensors = "cuda", True, True

    def __init__(self) -> None:
        super().__init__()
        self.cache_bytes = 1 << 18

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "cuda",
            "model": "a CPU in its place",
            "capability": "0.0",
            "multiprocessors": 1,
            "memory_bytes": 1 << 34,
            "cache_bytes": self.cache_bytes,
        }

    def release(self) -> None:
        # A collection of all that the tests imported takes a fifth of a second, and a run makes dozens.
        return None

    def allocated(self) -> int:
        return 1000

    def reset_peak(self) -> None:
        return None

    def peak(self) -> int:
        return 1000 + 2**30


def measure(sections: tuple[str, ...] | None = None) -> dict[str, Any]:
    """A quick GPU run of these sections on this CPU, as JSON would give it back."""
    cells = harness.cells("cuda-quick", sections)
    cells |= {"longest": tuple(replace(search, seconds=0.0) for search in cells.get("longest", ()))}
    made = harness.new_run(CpuMachine(), "cuda-quick", cells)
    compiling, *steps = harness.steps(made)
    assert compiling.label == "compiling kernels"
    for step in steps:
        step.run()
    found: dict[str, Any] = json.loads(json.dumps(made.result))
    return found
