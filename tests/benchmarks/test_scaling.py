"""The benchmark over several devices, on two processes of the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks import scaling_picture, shares
from benchmarks.scaling import rows_of


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
    assert result["ranks"] == 2 and len(found_patterns) == 6 and "ratio" in found.stdout
    for one in found_patterns.values():
        assert max(one["errors"].values()) < 1e-5
        assert len(one["seconds"]["together"]) == len(one["seconds"]["alone"])
    spanning = found_patterns["a segment over all ranks"]
    # The longest segment is shared, or nothing would be measured.
    assert max(spanning["kind"]["segment_lengths"]) == 2 * spanning["shard"] and spanning["bytes_sent"][0] > 0
    # One window's keys but its own, of 4 heads.
    assert found_patterns["window 512"]["bytes_sent"] == [511 * 4 * 2 * 64 * 4, 0]
    for name in ("dense, in shards", "dense, gathered"):
        assert found_patterns[name]["pairs"] > 2.9


def _keep_nothing(post, into, *_, **__):
    into.zero_()
    return post


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_in_turn_give_one_devices_result(tmp_path, monkeypatch, ranks):
    """A small size; what a rank keeps to itself is noticed."""
    monkeypatch.setattr(shares, "rows_of", lambda *_: [replace(row, tokens=600) for row in rows_of(False, ranks)])
    monkeypatch.setattr(shares, "ROUNDS", 1)
    result = shares.run(tmp_path / "shares.json", ranks, [])
    assert json.loads((tmp_path / "shares.json").read_text())["kind"] == "shares"
    by_name = {one["pattern"]: one for one in result["patterns"]}
    assert len(by_name) == 5 and by_name["dense, in shards"]["pairs"] == pytest.approx(2 * ranks - 1, abs=0.01)
    for one in by_name.values():
        assert max(one["errors"].values()) < 1e-5 and one["checked_tokens"] == 600 * ranks
        assert {f"rank {rank}" for rank in range(ranks)} < one["seconds"].keys()
    monkeypatch.setattr(shares.Post, "all_to_all_single", _keep_nothing)
    with pytest.raises(Exception, match="what the ranks compute against one device's result, window 512"):
        shares.run(None, ranks, ["window 512"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "."], "argument --out: . is a folder: expected the name of a JSON file"),
        (["--ranks", "1"], "--ranks 1: expected 2 to 64, as one device holds the tokens of all"),
        (["--ranks", "100000"], "--ranks 100000: expected 2 to 64"),
        (["--only"], "argument --only: expected at least one argument"),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(monkeypatch, capsys, options, words):
    monkeypatch.setattr(sys, "argv", ["shares", *options])
    monkeypatch.setattr(shares, "run", lambda *_: pytest.fail("it began"))
    with pytest.raises(SystemExit):
        shares.main()
    assert words in capsys.readouterr().err


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
