"""The benchmark that trains by the command over several processes, on two of the CPU."""

from __future__ import annotations

import json
import subprocess

import pytest

from benchmarks import report, training_ranks


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_ranks, "STEPS", 40)
        patch.setattr(training_ranks, "KILLED_AT", 7)
        out = tmp_path_factory.mktemp("made") / "training.json"
        training_ranks.run(out, 2)
        return json.loads(out.read_text())


def test_processes_are_compared_with_one(trained):
    runs = [(one["processes"], one["cp"], one["accumulate"]) for one in trained["runs"]]
    assert runs == [(1, 1, 1), (2, 2, 1), (2, 1, 1), (1, 1, 2)]
    for one in trained["runs"]:
        assert len(one["losses"]) == 40 and one["tokens_per_second"] > 0
        assert one["difference"] < 1e-4
    assert len({tuple(one["losses"]) for one in trained["runs"]}) > 1


def test_one_is_killed_and_the_other_goes_on(trained):
    killed = trained["killed"]
    assert killed["saved"] in range(5, 40, 5) and killed["saved"] <= killed["killed_at"] < 40
    assert len(killed["said"]) == 1 and "process 1 of 2 is gone" in killed["said"][0]
    assert killed["resumed_by"] == 1 and killed["difference"] < 1e-4


def test_a_difference_above_the_limit_is_missed(trained):
    tables = report.plain(trained)
    assert "A process is killed" in tables and tables.count("all limits reached") == 1
    worse = report.plain({**trained, "killed": {**trained["killed"], "difference": 0.02}})
    assert "missed: A process is killed, " in worse and "all limits reached" not in worse


def test_windows_in_turn_promise_nothing(trained):
    *others, in_turn = trained["runs"]
    shown = report.plain({**trained, "runs": [*others, {**in_turn, "difference": 0.02}]})
    assert "2.0e-02" in shown and shown.count("all limits reached") == 1


def test_a_run_that_does_not_come_far_is_ended(tmp_path, monkeypatch):
    """Its processes too."""
    monkeypatch.setattr(training_ranks, "PATIENCE", 6.0)
    monkeypatch.setattr(training_ranks, "KILLED_AT", 10**6)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "text.txt").write_text("a line\n" * 9)
    with pytest.raises(RuntimeError, match="did not come to step 1000000"):
        training_ranks.kill_one(tmp_path / "run", 2, 2, [])
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in listed


def test_what_cannot_be_compared_is_said(tmp_path, monkeypatch, capsys):
    steps = [{"step": step, "loss": 1.0} for step in (1, 2)]
    with pytest.raises(RuntimeError, match="a run has 1 steps, and one process 2"):
        training_ranks.difference(steps[:1], steps)
    with pytest.raises(RuntimeError, match=r"failed:\n[\s\S]*cp=3 with 1 process"):
        training_ranks.finish(training_ranks.command(tmp_path / "run", 1, 3, 2))
    monkeypatch.setattr(training_ranks.torch.cuda, "is_available", lambda: False)
    for ranks in ("3", "0", "1000"):
        monkeypatch.setattr("sys.argv", ["training_ranks", "--ranks", ranks])
        with pytest.raises(SystemExit):
            training_ranks.main()
        assert f"--ranks {ranks}: expected an even number of processes from 2 to 16" in capsys.readouterr().err
