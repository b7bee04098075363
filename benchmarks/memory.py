"""Peak memory beyond the inputs, each case in a fresh process.

Linux only: the kernel's own high-water mark of resident memory (VmHWM), reset through /proc/self/clear_refs. It sees
what the kernels allocate inside torch too, which no allocator statistic of torch's does on the CPU.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, draw
from benchmarks.checks import CheckFailed, allowed_at_size, rows_at_size
from benchmarks.contenders import ours
from benchmarks.environment import child_environment

_ROOT = Path(__file__).resolve().parents[1]
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def why_not() -> str | None:
    """Why memory cannot be measured here, or None."""
    if sys.platform != "linux":
        return f"it needs Linux's /proc/self/clear_refs, and this is {sys.platform}"
    try:
        reset_peak()
    except OSError as error:
        return f"/proc/self/clear_refs cannot be written: {error.strerror}"
    return None


def memory(case: Case, which: str, processes: int) -> dict[str, Any]:
    """Peaks of :func:`probe`, each in a process of its own.

    ``peak_bytes`` is what is resident with malloc as it comes, which keeps some of what was freed and differs from
    process to process. ``live_peak_bytes`` is from one more process whose malloc maps every block from 64 KiB up by
    itself and so returns it when it is freed: what the call holds at once.

    Raises:
        CheckFailed: the result measured there is not the definition's.
        RuntimeError: the process died; the message has its last words.
    """
    records = [_in_a_process(case, which, {}) for _ in range(processes)]
    live = _in_a_process(case, which, {"MALLOC_MMAP_THRESHOLD_": "65536"})
    peaks = [record.pop("peak_bytes") for record in records]
    return {**records[0], "peak_bytes": peaks, "live_peak_bytes": live["peak_bytes"]}


def _in_a_process(case: Case, which: str, settings: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", json.dumps(case.to_dict()), which],
        cwd=_ROOT,
        env={**child_environment(), **settings},
        capture_output=True,
        text=True,
    )
    if done.returncode == 3:
        raise CheckFailed(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise RuntimeError(f"measuring the memory of {case}, {which} ended with code {done.returncode}:\n{last}")
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def probe(case: Case, which: str) -> dict[str, Any]:
    """Peak resident bytes of one call beyond q, k, v (and, for the backward pass, the gradient given for out).

    A call on fewer heads and at most one longest segment first, so that libraries loaded on first use and the buffers
    that they keep for good (matrix products of this size have their own) do not count. The result itself counts.
    """
    warm = replace(
        case,
        heads=min(case.heads, max(case.dilation_rates)),
        length=min(case.length, max(case.segment_lengths)),
    )
    ours(warm, draw(warm)).passes[which]()
    tensors = draw(case)
    contender = ours(case, tensors)
    gc.collect()
    # Freed memory that malloc keeps would be used again without being seen.
    ctypes.CDLL(None).malloc_trim(0)
    reset_peak()
    before = resident("VmRSS")
    result = contender.passes[which]()
    peak = resident("VmHWM") - before
    checks = rows_at_size(case, tensors, result[0], allowed_at_size(case, tensors)[0])
    return {
        "case": case.to_dict(),
        "pass": which,
        "peak_bytes": peak,
        "output_bytes": result[0].nbytes,
        "grad_out_bytes": tensors.grad_out.nbytes if which == "forward_backward" else 0,
        "checks": [asdict(check) for check in checks],
    }


def reset_peak() -> None:
    """Set VmHWM to what is resident now."""
    _CLEAR.write_text("5")


def resident(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no field {field}")


def main() -> None:
    try:
        record = probe(Case.from_dict(json.loads(sys.argv[1])), sys.argv[2])
    except CheckFailed as error:
        print(error, file=sys.stderr)
        raise SystemExit(3) from None
    print(json.dumps(record))


if __name__ == "__main__":
    main()
