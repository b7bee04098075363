"""The benchmark of windows and strides: it compares before it times, and every row has its limit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import decoding, report, results, windows
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


def test_a_run_goes_on_with_what_is_missing(monkeypatch, tmp_path):
    every = list(windows.rows(on_gpu=False))
    monkeypatch.setattr(windows.measure, "__defaults__", (2,))
    out = tmp_path / "windows.json"
    monkeypatch.setattr(windows, "rows", lambda on_gpu: iter(every[:2]))
    first = windows.run(out)
    monkeypatch.setattr(windows, "rows", lambda on_gpu: iter(every[:4]))
    both = windows.run(out)
    assert both["rows"][:2] == json.loads(json.dumps(first["rows"]))
    kinds = [record["kind"] for record in json.loads(out.read_text())["rows"]]
    assert kinds == json.loads(json.dumps([row.shown for row in every[:4]]))
    changed = json.loads(out.read_text())
    changed["commit"]["sources"] = "others"
    out.write_text(json.dumps(changed))
    with pytest.raises(results.NoResult, match="the sources others, this run"):
        windows.run(out)


def test_pairs_in_tiles_are_those_that_tiles_touch():
    """Of 300 queries in three blocks: a window's keys up to 128, 256 and from 57 to 300, a stride's 64, 128 and 150."""
    case = next(row for row in windows.rows(on_gpu=False)).case
    case = windows.replace(case, length=300, heads=2)
    pattern = windows.Pattern.compose(None, 2, window=200, dilated_queries=False)
    window, strided = 1 + 2 + 2, 1 + 1 + 2
    assert windows.pairs_in_tiles(pattern, case) == 2 * (window + strided) * 128 * 128


def test_a_token_beside_dense_decoding():
    for row in decoding.rows(on_gpu=False):
        record = decoding.measure(row, Cpu(), rounds=2)
        assert record["error"] < 1e-5 and record["ratio"] > 0
        assert record["bytes"] < 0.4 * record["dense_bytes"]


def test_results_become_tables():
    rows = [windows.measure(row, Cpu(), rounds=2) for row in windows.rows(on_gpu=False)]
    (made,) = report.tables({"kind": "windows", "rows": rows})
    passes = [name for record in rows for name in record["passes"]]
    assert len(made.rows) == len(passes)
    named = {row[0] for row in made.rows}
    assert {"window 32", "stride 2, window 32", "stride 8, blocks of 32, window 32", "LongNet, window 512"} <= named
    assert all(row[-1] in ("reached", "missed") for row in made.rows)
    records = [decoding.measure(row, Cpu(), rounds=2) for row in decoding.rows(on_gpu=False)]
    (made,) = report.tables({"kind": "decoding", "rows": records})
    assert [row[:4] for row in made.rows] == [("2", "4", "4", "16"), ("2", "4", "1", "16")]
