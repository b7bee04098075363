"""Several GPUs over NCCL: shards against one device, training against one process, and a process that is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(GPUS < 2, reason="needs two CUDA GPUs")

HERE = Path(__file__).parent
SOURCES = f"{HERE.parents[1] / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": SOURCES}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(GPUS)]


def run(*command, seconds=300):
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=seconds, check=False)


def train(out, *more):
    return [
        "-m", "longnet", "train", "--preset", "nano", "--context", "2048", "--dtype", "float32", "--eval-every", "0",
        "--save-every", "8", "--schedule", "constant", "--out", str(out), *more,
    ]  # fmt: skip


def losses(out):
    path = out / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    found = [json.loads(line) for line in lines]
    return {line["step"]: line["loss"] for line in found if line["kind"] == "train"}


def test_shards_over_nccl_are_one_device():
    found = run(*TORCHRUN, str(HERE / "nccl_ranks.py"))
    assert found.returncode == 0, found.stderr[-6000:]
    assert found.stdout.count("cases agree") == GPUS


def test_training_over_nccl_loses_a_process_and_goes_on_alone(tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [*TORCHRUN, *train(out, "--steps", "100000", "--cp", str(GPUS))],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    begun = time.monotonic()
    while max(losses(out), default=0) < 12:
        assert process.poll() is None and time.monotonic() < begun + 200, process.communicate()[0][-4000:]
        time.sleep(0.02)
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    )
    os.kill(sorted(map(int, listed.stdout.split()))[-1], signal.SIGKILL)
    lost = time.monotonic()
    said = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and time.monotonic() - lost < 60
    assert f"process {GPUS - 1} of {GPUS} is gone" in said and said.count("longnet: error") == 1, said[-6000:]
    before = losses(out)
    # From the last checkpoint on, one process: its losses are those that several had.
    steps = max(before) + 5
    resumed = run(sys.executable, *train(out, "--steps", str(steps), "--resume", "--cp", "1"))
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    assert "Resuming after step" in resumed.stdout + resumed.stderr
    after = losses(out)
    assert max(after) == steps
    for step, loss in before.items():
        assert abs(after[step] - loss) < 1e-4 * loss, step
