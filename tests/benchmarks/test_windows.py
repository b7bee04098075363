"""The benchmark of windows and strides: it compares before it times, and every row has its limit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import windows
from benchmarks.checks import CheckFailed
from benchmarks.device import Cpu


def test_it_measures_one_row_of_each_kind():
    by_kind = {row.beside: row for row in windows.rows(on_gpu=False)}
    assert by_kind.keys() == windows.LIMITS.keys()
    for beside, row in by_kind.items():
        record = windows.measure(row, Cpu(), rounds=2)
        assert record["error"] < 1e-5
        assert list(record["passes"]) == (["forward"] if beside == "flex" else ["forward", "forward_backward"])
        assert all(len(one["seconds"]["ours"]) == 2 and one["ratio"] > 0 for one in record["passes"].values())


def test_the_share_of_pairs_is_that_of_the_issue():
    """At 8,192 tokens windows of 512 are 0.12 of dense attention's pairs, with strides of 4 added 0.37."""
    shares = {(str(row.kind), row.case.length): row.share for row in windows.rows(on_gpu=True) if row.beside == "dense"}
    assert shares[str(windows.strided(4, 1)), 131072] == pytest.approx(0.25 + 0.0078, abs=1e-3)


def test_it_refuses_to_time_what_is_not_the_definition(monkeypatch):
    row = next(row for row in windows.rows(on_gpu=False) if row.beside == "dense")
    right = windows.dilated_attention
    monkeypatch.setattr(windows, "dilated_attention", lambda *args, **more: right(*args, **{**more, "window": 9}))
    with pytest.raises(CheckFailed):
        windows.measure(row, Cpu(), rounds=2)


def test_a_run_keeps_what_it_has(monkeypatch, tmp_path):
    every = list(windows.rows(on_gpu=False))
    monkeypatch.setattr(windows, "rows", lambda on_gpu: iter(every[:2]))
    monkeypatch.setattr(windows.measure, "__defaults__", (2,))
    result = windows.run(tmp_path / "windows.json")
    assert (tmp_path / "windows.json").is_file() and len(result["rows"]) == 2
    assert {"commit", "versions", "device"} <= result.keys()
