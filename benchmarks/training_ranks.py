"""``longnet train`` over several processes: losses beside one process's, tokens a second, and a process that is killed.

    python -m benchmarks.training_ranks --ranks 4 --out training-4.json

The command trains one model several times, the same steps on the same windows: in one process, with every window shared by all
(``--cp 4``), by groups of two where there are several (``--cp 2``), and with windows side by side. One process trains once more
with one window after another, so that its gradients are summed in another order: what rounding alone does to its losses. In one
more run the last process is killed after some steps, and half as many go on from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

import longnet
from benchmarks import report, results
from benchmarks.cases import Record
from longnet.training.folder import RunFolder

# Steps of a run, the step after which a process is killed, and the largest difference of a loss.
STEPS, KILLED_AT, LIMIT = 50, 12, 1e-2
# Processes at most where there is no GPU.
MOST = 16
# Seconds for a run, and for the others to end once one is killed.
PATIENCE = 400


def command(out: Path, processes: int, cp: int, batch: int, *more: str) -> list[str]:
    """The command of a run into a folder beside ``data``."""
    sizes = ("small", "32768", "bfloat16") if torch.cuda.is_available() else ("nano", "512", "float32")
    options = {
        "--preset": sizes[0], "--context": sizes[1], "--dtype": sizes[2], "--batch": str(batch), "--optimizer": "muon",
        "--lr": "1e-3", "--schedule": "constant", "--eval-every": "0", "--save-every": "5", "--out": str(out),
        "--data": str(out.parent / "data"), "--cp": str(cp),
    }  # fmt: skip
    launch = (
        ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"] if processes > 1 else []
    )
    return [sys.executable, "-m", *launch, "longnet", "train", *(x for pair in options.items() for x in pair), *more]


def environment() -> dict[str, str]:
    return {"OMP_NUM_THREADS": "2", **os.environ}


def steps_of(out: Path) -> list[Record]:
    """What the run wrote of every step so far."""
    file = out / "metrics.jsonl"
    lines = [line for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
    return [line for line in map(json.loads, lines) if line["kind"] == "train"]


def finish(order: Sequence[str]) -> None:
    """Run it to its end.

    Raises:
        RuntimeError: it failed.
    """
    ended = subprocess.run(order, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(order)} failed:\n{(ended.stdout + ended.stderr)[-4000:]}")


def difference(steps: Sequence[Record], wanted: Sequence[Record]) -> float:
    """The largest of any step's loss.

    Raises:
        RuntimeError: other steps.
    """
    if [one["step"] for one in steps] != [one["step"] for one in wanted]:
        raise RuntimeError(f"a run has {len(steps)} steps, and one process {len(wanted)}")
    return max(abs(one["loss"] - other["loss"]) for one, other in zip(steps, wanted, strict=True))


def measure(out: Path, processes: int, cp: int, batch: int, wanted: Sequence[Record], accumulate: int = 1) -> Record:
    """One run; ``wanted`` are one process's steps, none for that one."""
    finish(command(out, processes, cp, batch // accumulate, "--accumulate", str(accumulate), "--steps", str(STEPS)))
    steps = steps_of(out)
    return {
        "processes": processes, "cp": cp, "accumulate": accumulate, "losses": [one["loss"] for one in steps],
        "first_seconds": steps[0]["seconds"],
        "tokens_per_second": median(one["tokens_per_second"] for one in steps[STEPS // 2 :]),
        "difference": difference(steps, wanted or steps),
    }  # fmt: skip


def workers(process: subprocess.Popen[Any]) -> list[int]:
    """The processes that torchrun started, in order."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    )
    return sorted(map(int, listed.stdout.split()))


def kill_one(out: Path, ranks: int, batch: int, wanted: Sequence[Record]) -> Record:
    """A run of ``--cp RANKS`` whose last process is killed; half as many go on.

    Raises:
        RuntimeError: it ended before, or too late, or did not fail.
    """
    order = command(out, ranks, ranks, batch, "--steps", "100000")
    printed = out.with_suffix(".txt")
    with printed.open("w") as file:
        process = subprocess.Popen(order, env=environment(), stdout=file, stderr=subprocess.STDOUT)
    begun = time.monotonic()
    try:
        while len(steps_of(out)) < KILLED_AT:
            if process.poll() is not None or time.monotonic() > begun + PATIENCE:
                raise RuntimeError(
                    f"{' '.join(order)} did not come to step {KILLED_AT}:\n{printed.read_text()[-4000:]}"
                )
            time.sleep(0.02)
        os.kill(workers(process)[-1], signal.SIGKILL)
        killed = time.monotonic()
        process.wait(PATIENCE)
    finally:
        # torchrun ends its processes.
        if process.poll() is None:
            process.terminate()
            process.wait()
    seconds, at, said = time.monotonic() - killed, len(steps_of(out)), printed.read_text()
    if not process.returncode or at >= STEPS:
        raise RuntimeError(f"the run ended with {process.returncode} after {at} steps:\n{said[-4000:]}")
    lines = [line for line in said.splitlines() if line.startswith("longnet: error")]
    saved = json.loads(RunFolder(out).latest_file.read_text())["progress"]["step"]
    fewer = max(1, ranks // 2)
    finish(command(out, fewer, fewer, batch, "--steps", str(STEPS), "--resume"))
    return {
        "killed_at": at, "saved": saved, "ended_after": seconds, "said": lines, "resumed_by": fewer,
        "difference": difference(steps_of(out), wanted),
    }  # fmt: skip


def run(out: Path | None, ranks: int) -> Record:
    on_gpu = torch.cuda.is_available()
    result = results.started(
        kind="training over ranks", device=torch.cuda.get_device_name(0) if on_gpu else "cpu", ranks=ranks, steps=STEPS,
        limit=LIMIT, runs=[], killed=None,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        # A copy: caches of compiled files appear and change in a package that is used.
        package = Path(longnet.__file__).parent
        shutil.copytree(package, Path(folder) / "data", ignore=shutil.ignore_patterns("__pycache__"))
        alone = Path(folder) / "alone"
        for processes, cp, turns in dict.fromkeys(
            ((1, 1, 1), (ranks, ranks, 1), (ranks, 2, 1), (ranks, 1, 1), (1, 1, ranks))
        ):
            path = Path(folder) / f"cp-{cp}-{turns}" if result["runs"] else alone
            print(f"{processes} process(es), --cp {cp}, --accumulate {turns}", flush=True)
            result["runs"].append(measure(path, processes, cp, ranks, steps_of(alone), turns))
            results.save(result, out)
        print("A process is killed", flush=True)
        result["killed"] = kill_one(Path(folder) / "killed", ranks, ranks, steps_of(alone))
    results.save(result, out)
    print(report.plain(result))
    return result


def main() -> None:
    parser = results.program("training_ranks", __doc__)
    parser.add_argument("--ranks", type=int, default=2, help="processes, an even number")
    options = parser.parse_args()
    most, of = (torch.cuda.device_count(), "for each GPU") if torch.cuda.is_available() else (MOST, "on a CPU")
    if not 2 <= options.ranks <= most or options.ranks % 2:
        parser.error(f"--ranks {options.ranks}: expected an even number of processes from 2 to {most}, {of}")
    run(options.out, options.ranks)


if __name__ == "__main__":
    main()
