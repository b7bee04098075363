"""The table and the picture of equal-time runs."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks.learning import equal_time_report as report

RUN = {
    "schema": 1, "stack": "balanced", "seed": 0, "context": 2048, "batch": 2, "minutes": 1.0, "converted": None, "share": None,
    "steps": 120, "seconds_a_step": {"longnet": 0.5, "cuDNN": 0.25}, "dense_by": "cuDNN", "cost": 0.25, "peak_bytes": 2**31,
    "curve": [[1, 3.0, 8.0], [60, 18.0, 2.0], [120, 33.0, 1.0]],
    "at": {"2048": {"bits": 1.0, "by_window": [0.9, 1.1], "copied": {"1024": 0.2}}},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    def put(name, bits=0.0, **changes):
        run = {**copy.deepcopy(RUN), **changes}
        scores = run["at"]["2048"]
        scores["bits"] += bits
        scores["by_window"] = [one + bits for one in scores["by_window"]]
        (tmp_path / f"{name}.json").write_text(json.dumps(run))

    put("balanced-0")
    put("balanced-1", 0.02, seed=1, steps=118)
    put("window-0", 0.5, stack="window", cost=0.1, seconds_a_step={"longnet": 0.2}, dense_by="longnet")
    put("half", 0.1, stack="light", converted="window-0", share=0.05, rate=0.3, seconds_a_step={}, dense_by="longnet")
    return tmp_path, put


def test_the_best_comes_first_and_the_others_beside_it(folder):
    made = report.comparison(report.load(folder[0]))
    assert made.columns[-2] == "bits of a passage 1,024 back"
    rows = {row[0]: row for row in made.rows}
    assert list(rows) == ["balanced", "window"]
    assert rows["balanced"] == ("balanced", "0.250", "118 to 120", "16k", "2.0", "1.0100", "0", "0.20", "2")
    assert rows["window"][2] == "120"
    # The windows differ by as much, so the standard error is 0.
    assert rows["window"][3:7] == ("20k", "2.0", "1.5000", "+0.5000 +- 0.0000")


def test_what_cannot_be_compared_is_refused(folder):
    path, put = folder
    with pytest.raises(ValueError, match=r"no run of 'light': expected one among \['balanced', "):
        report.comparison(report.load(path), "light")
    put("other", stack="light", seed=7)
    with pytest.raises(ValueError, match=r"seeds \[7\] beside those of \[0, 1\]: expected one seed that both have"):
        report.comparison(report.load(path))
    put("other", stack="light", minutes=2.0)
    with pytest.raises(ValueError, match=r"holds runs of minutes \[1.0, 2.0\]: expected one folder for each"):
        report.load(path)
    with pytest.raises(ValueError, match=r"holds no \*.json"):
        report.load(path / "none")


def test_the_picture_has_a_panel_for_each_folder(folder, tmp_path):
    groups = report.load(folder[0])
    assert report.picture([groups, groups], tmp_path / "made.png").stat().st_size > 10_000
    assert list(report.smooth(report.np.array([1.0, 2.0, 6.0]), 2)) == [1.0, 1.5, 4.0]


def test_a_curve_is_the_mean_of_its_seeds_at_one_time():
    slower = {
        **RUN,
        "seed": 1,
        "steps": 60,
        "seconds_a_step": {"cuDNN": 0.5},
        "curve": [[1, 3.0, 8.0], [60, 33.0, 4.0]],
    }
    minutes, bits = report.mean_curve([RUN, slower])
    assert list(minutes) == pytest.approx([1 / 240, 0.25, 0.5])
    # Nine points are averaged, the first of a run repeated before it: 8, (8 * 8 + 2) / 9, (7 * 8 + 2 + 1) / 9.
    fast, slow = [8, 22 / 3, (56 + 3) / 9], [8, 8 - 4 / 9 * 29 / 59, 8 - 4 / 9]
    assert list(bits) == pytest.approx([(a + b) / 2 for a, b in zip(fast, slow, strict=True)])


def test_converted_runs_stand_beside_the_run_that_they_began_with(folder):
    path, put = folder
    put("other", -0.1, stack="window+dense 1/2", converted="balanced-1", share=0.0, rate=0.3, cost=0.5, seed=0)
    made = report.conversions(report.load(path))
    assert made.columns[-1] == "bits of a passage 1,024 back"
    assert made.rows == (
        ("balanced", "window+dense 1/2", "0.500", "0%", "-0.1200 +- 0.0000", "0.20"),
        ("window", "light", "0.250", "5%", "-0.4000 +- 0.0000", "0.20"),
    )
    (path / "window-0.json").unlink()
    with pytest.raises(ValueError, match="no result of window-0, the origin of a converted run"):
        report.conversions(report.load(path))


def test_converted_runs_alone_are_refused(folder, tmp_path):
    for path in folder[0].glob("*.json"):
        if path.stem != "half":
            path.unlink()
    groups = report.load(folder[0])
    for call in (report.comparison, lambda groups: report.picture([groups], tmp_path / "made.png")):
        with pytest.raises(ValueError, match="a folder holds converted runs alone"):
            call(groups)


def test_models_that_were_scored_at_other_lengths(folder, tmp_path):
    path, put = folder
    assert report.lengths(report.load(path)).rows == ()
    with pytest.raises(ValueError, match="no model was scored at other lengths"):
        report.lengths_picture([report.load(path)], tmp_path / "made.png")
    more = {"bits": 2.0, "by_window": [2.0], "copied": {"1024": 0.5, "4096": 0.75}}
    for seed, off in ((0, 0.0), (1, 0.5)):
        at = {
            name: {**scores, "by_position": {"0 to 256": 3.0, "256 to 1024": 1.0}} for name, scores in RUN["at"].items()
        }
        at["8192"] = {**at["2048"], **more, "bits": 2.0 + off}
        put(f"light-{seed}", stack="light", seed=seed, at=at)
    made = report.lengths(report.load(path))
    assert (
        made.columns[1:3] == ("bits a byte at 2,048", "bits a byte at 8,192")
        and made.columns[-1] == "4,096 back at 8,192"
    )
    assert made.rows == (("light", "1.0000", "2.2500", "0.20", "0.50", "0.75"),)
    assert report.lengths_picture([report.load(path)], tmp_path / "made.png").stat().st_size > 10_000
    put("dense", stack="dense", at={**at, "4096": at["8192"]})
    with pytest.raises(ValueError, match=r"scored at the lengths .*'4096'.* expected the same --read for all"):
        report.lengths(report.load(path))


def test_results_of_other_windows_are_not_compared(folder):
    folder[1]("other", stack="light", at={"2048": {**RUN["at"]["2048"], "by_window": [1.0]}})
    with pytest.raises(ValueError, match=r"results of \[1, 2\] held-out windows: expected one number of them"):
        report.comparison(report.load(folder[0]))
