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
    found_patterns = {one["pattern"]: one for one in result["patterns"]}
    assert result["ranks"] == 2 and len(found_patterns) == 5 and "ratio" in found.stdout
    for one in found_patterns.values():
        assert max(one["errors"].values()) < 1e-5
        assert len(one["seconds"]["together"]) == len(one["seconds"]["alone"])
    spanning = found_patterns["a segment over all ranks"]
    # The longest segment is shared, or nothing would be measured.
    assert max(spanning["kind"]["segment_lengths"]) == 2 * spanning["shard"] and spanning["bytes_sent"][0] > 0
    # One window's keys but its own, of 4 heads.
    assert found_patterns["window 512"]["bytes_sent"] == [511 * 4 * 2 * 64 * 4, 0]
    assert found_patterns["dense, gathered"]["pairs"] > 2.9
