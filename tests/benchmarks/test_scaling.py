"""The benchmark over several devices, on two processes of the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks import scaling_picture


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


def scaling(ranks: int, **changes: object) -> dict:
    rows = [
        {"pattern": "published", "even": True, "ratio": 1 + 0.01 * ranks, "pairs": 1.0},
        {"pattern": "dense, gathered", "even": False, "ratio": 3.0 * ranks, "pairs": 2.0},
    ]
    return {
        "schema": 1,
        "kind": "scaling",
        "device": "a GPU",
        "ranks": ranks,
        "limit": 1.08,
        "patterns": rows,
    } | changes


def test_the_picture_has_a_point_for_each_number_of_devices(tmp_path, monkeypatch, capsys):
    assert scaling_picture.ratios([scaling(2), scaling(4)]) == {
        "published": {1: 1.0, 2: 1.02, 4: 1.04},
        "dense, gathered, over pairs": {1: 1.0, 2: 3.0, 4: 6.0},
    }
    files = [tmp_path / f"{ranks}.json" for ranks in (2, 4)]
    for ranks, file in zip((2, 4), files, strict=True):
        file.write_text(json.dumps(scaling(ranks)))
    picture = tmp_path / "new" / "made.png"
    monkeypatch.setattr(sys, "argv", ["scaling_picture", *map(str, files), "--to", str(picture)])
    scaling_picture.main()
    assert picture.stat().st_size > 10_000 and str(picture) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([scaling(2), scaling(2)], "'published' was measured on 2 devices twice"),
        ([scaling(2), scaling(4, device="cpu")], r"results of the devices \['a GPU', 'cpu'\]: expected one kind"),
        (
            [scaling(2, kind="windows")],
            r"results of kind \['windows'\]: expected those of python -m benchmarks.scaling",
        ),
    ],
)
def test_results_that_do_not_belong_together_make_no_picture(records, words):
    with pytest.raises(ValueError, match=words):
        scaling_picture.ratios(records)
