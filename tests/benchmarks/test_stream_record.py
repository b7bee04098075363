"""The record of a long stream becomes a result whose figures are the record's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import report, results, stream_record

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "billion-2026-11-25.json"


def write_record(folder: Path, bits: list[float], peaks: list[int]) -> None:
    """Lines of a hundred bytes each, and the result that ends a record."""
    settings = {"bytes": 1000, "files": 1, "tokens": 1000, "chunk": 100, "dtype": "bfloat16", "cache_bytes": 2**20}
    lines: list[dict[str, object]] = [{"kind": "settings", "versions": {"torch": "2"}, **settings}]
    for number, (one, peak) in enumerate(zip(bits, peaks, strict=True), start=1):
        lines.append(
            {"kind": "progress", "position": 100 * number, "new_bytes": 100, "new_seconds": 2.0}
            | {"new_bits_per_byte": one, "memory_peak": peak}
        )
    tenth = {"tokens_per_second": 50.0}
    ends = {"first_tenth": tenth | {"memory_peak": peaks[0]}, "last_tenth": tenth | {"memory_peak": peaks[-1]}}
    found = {"position": 1000, "seconds": 20.0, "tokens_per_second": 50.0, "decades": [], **ends}
    lines.append({"kind": "result", **found})
    (folder / "stream.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.json").write_text(json.dumps({"settings": {"lr": 1e-3, "out": "somewhere", "data": "elsewhere"}}))


def test_figures_are_the_records(tmp_path: Path) -> None:
    write_record(tmp_path, [2.0] * 4 + [3.0] * 4 + [9.0] * 2, [2**30] * 10)
    result = stream_record.collect(tmp_path, tmp_path, "a GPU", "abc", 800)
    found = {row[0]: row[1:] for row in report.tables(result)[1].rows}
    assert found["seconds"] == ("20", "600", "reached")
    assert found["peak GPU memory GiB"] == ("1.00", "16", "reached")
    assert found["bits per byte of its slices, mean"][0] == "2.500"
    assert found["first and last quarter"][0] == "2.000 and 3.000"
    assert result["training"] == {"lr": 1e-3}


def test_memory_that_grows_is_missed(tmp_path: Path) -> None:
    write_record(tmp_path, [2.0] * 10, [2**30] * 9 + [2**31])
    result = stream_record.collect(tmp_path, tmp_path, "a GPU", "abc", 1000)
    assert list(report.summary(result)) == ["missed: last tenth's peak over the first's, less 1"]


def test_an_unfinished_record_is_refused(tmp_path: Path) -> None:
    write_record(tmp_path, [2.0] * 10, [2**30] * 10)
    path = tmp_path / "stream.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="no finished stream"):
        stream_record.collect(tmp_path, tmp_path, "a GPU", "abc", 1000)


def test_the_committed_pass_reached_its_limits() -> None:
    result = results.load(RESULT)
    assert result["result"]["position"] == 1_000_000_000
    assert list(report.summary(result)) == ["all limits reached"]
