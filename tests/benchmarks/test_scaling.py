"""The benchmark over several devices, on two processes of the CPU."""

from __future__ import annotations

import json
import os
import subprocess


def test_two_processes_are_compared_with_one(tmp_path, forked):
    out = tmp_path / "scaling.json"
    found = subprocess.run(
        [
            *(*forked, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"),
            *(*forked, "-m", "benchmarks.scaling"),
            "--out",
            out,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    result = json.loads(out.read_text())
    assert result["ranks"] == 2 and max(result["errors"].values()) < 1e-5
    # The longest segment is shared, or nothing would be measured.
    assert max(result["shard"]["segment_lengths"]) == 2 * result["shard"]["length"]
    assert len(result["seconds"]["together"]) == len(result["seconds"]["alone"]) and "ratio" in found.stdout
