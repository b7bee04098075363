"""The benchmark of what people wait for, at toy sizes: every section gives rows that become a table."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks import report, results, waiting
from benchmarks.device import Cpu

SIZES = replace(waiting.SMALL, steps=((2, 64),) * 3, calls=1, rounds=1, new_tokens=3, repeats=1, compiler=None)


@pytest.mark.slow
def test_every_section_gives_rows_and_they_become_a_table(tmp_path) -> None:
    out = tmp_path / "waiting.json"
    result = waiting.run(out, [], SIZES)
    assert {one["section"] for one in result["rows"]} == set(waiting.SECTIONS)
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    for record in result["rows"]:
        assert set(record["seconds"]) >= {"ours", *filter(None, [record["beside"]])}
        # Differences of two times may be below 0.
        is_difference = "a token" in record["name"] or "beyond" in record["name"]
        assert is_difference or all(second > 0 for each in record["seconds"].values() for second in each)
    (made,) = report.tables(result)
    assert len(made.rows) == len(result["rows"])
    by_name = {row[0]: row for row in made.rows}
    assert by_name["call, forward"][-2] == "0.3 ms" and by_name["call, forward"][-1] in ("reached", "missed")
    assert by_name["a padding mask, D=16, forward_backward"][-2] == "1.1 of without"
    assert by_name["calls back to back, forward"][-1] == "-"
    # One section again: the others stay.
    again = waiting.run(out, ["calls"], SIZES)
    assert len(again["rows"]) == len(result["rows"])
    kept = [one for one in result["rows"] if one["section"] != "calls"]
    assert [one for one in again["rows"] if one["section"] != "calls"] == json.loads(json.dumps(kept))


def test_a_result_of_another_kind_is_not_written_over(tmp_path) -> None:
    out = tmp_path / "windows.json"
    results.save(results.started(kind="windows", device={"model": "another"}, rows=[]), out)
    with pytest.raises(results.NoResult, match="has the kind windows, this run waiting"):
        waiting.run(out, ["calls"], SIZES)


def test_a_wrong_call_is_not_timed(monkeypatch) -> None:
    right = waiting.checks.dilated_attention
    monkeypatch.setattr(waiting.checks, "dilated_attention", lambda *args, **options: 1.01 * right(*args, **options))
    with pytest.raises(waiting.checks.CheckFailed):
        next(waiting.calls(SIZES, Cpu()))
