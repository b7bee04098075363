"""Compiling kernels before anything is measured, in as many processes as there are cores.

Triton compiles a kernel on its first call, one after the other, and keeps it in a cache on disk: processes that make the
same calls beforehand do that work side by side.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Hashable, Iterable
from dataclasses import replace

from benchmarks.cases import Case, draw
from benchmarks.checks import attend_dilated, with_gradients
from benchmarks.environment import ROOT, child_environment

# Tensors of the case's size that a call holds (inputs, outputs, gradients), and memory of a process by itself.
_TENSORS, _PROCESS_BYTES = 10, 2**30


def compile_kernels(cases: Iterable[Case], memory_bytes: int) -> int:
    """Run a forward and backward of every case once, each in a process of its own; gives how many there were.

    The shortest of the cases that need the same kernels, and no more at a time than there are cores and memory for.

    Raises:
        RuntimeError: a process failed; the message has its last lines.
    """
    different = {_specialisation(case): case for case in sorted(cases, key=lambda case: -case.length)}
    needed = {case: _TENSORS * case.tensor_bytes + _PROCESS_BYTES for case in different.values()}
    budget = 0.9 * memory_bytes
    # What does not fit even alone compiles when it is measured.
    waiting = sorted((case for case in needed if needed[case] < budget), key=lambda case: -needed[case])
    count, cores = len(waiting), os.cpu_count() or 1
    running: dict[Case, subprocess.Popen[str]] = {}
    try:
        while waiting or running:
            held = sum(needed[case] for case in running)
            for case in list(waiting):
                if len(running) < cores and held + needed[case] < budget:
                    running[case] = _start(case)
                    waiting.remove(case)
                    held += needed[case]
            time.sleep(0.1)
            for case, process in list(running.items()):
                if process.poll() is not None:
                    del running[case]
                    if process.returncode:
                        last = "\n".join(process.communicate()[1].strip().splitlines()[-5:])
                        raise RuntimeError(f"compiling for {case} ended with code {process.returncode}:\n{last}")
                    process.communicate()
    finally:
        for process in running.values():
            process.kill()
            process.communicate()
    return count


def _specialisation(case: Case) -> tuple[Hashable, ...]:
    """Triton compiles anew for integers that are 1, multiples of 16 or wider than 32 bits: cases alike in these."""
    segments = -(-case.length // min(case.segment_lengths))
    lengths = (case.length % 16, segments == 1, segments % 16 == 0, case.length < min(case.segment_lengths))
    return (replace(case, length=1), lengths, case.batch * case.heads * case.length * case.head_dim >= 2**31)


def _start(case: Case) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.compiling", json.dumps(case.to_dict())],
        cwd=ROOT,
        env=child_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def main() -> None:
    import torch

    case = Case.from_dict(json.loads(sys.argv[1]))
    tensors = draw(case, 0, torch.device("cuda"))
    attend = attend_dilated(case)
    attend(*tensors.inputs)
    with_gradients(attend, tensors)
    torch.cuda.synchronize()
    # The kernels are in Triton's cache. Leaving the usual way, torch's threads have aborted a process now and then.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
