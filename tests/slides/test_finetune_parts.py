"""The parts of fine-tuning: tables and their errors, folds, losses, metrics, restated by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_cohorts import settings_of, write_table
from safetensors.torch import save_file

from longnet.slides import read_patients
from longnet.slides.finetune.charts import combined, curves_of, precision_of, risk_groups, roc_of
from longnet.slides.finetune.data import Tiles
from longnet.slides.finetune.metrics import over_folds, score
from longnet.slides.finetune.models import AttentionPooling, MeanPooling
from longnet.slides.finetune.outcome import FoldResult, Outcome
from longnet.slides.finetune.splits import Split, make_splits, rare_targets, read_splits, write_splits
from longnet.slides.finetune.table import Cohort, read_cohort
from longnet.slides.finetune.tasks import FoldTask
from longnet.slides.finetune.workers import Workers

HEADER = ("slide", "patient", "label", "label_a", "label_b", "time", "event")
ROWS = [
    ("s0", "p0", "yes", 1, 0, 3.5, 1),
    ("s1", "p0", "yes", 0, 1, 3.5, 1),
    ("s2", "p1", "no", 1, 1, 7, 1),
]


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    (tmp_path / "features").mkdir()
    for name in ("s0", "s1", "s2"):
        save_file(
            {"features": torch.randn(4, 8), "coords": torch.zeros(4, 2)}, tmp_path / "features" / f"{name}.safetensors"
        )
    write_table(tmp_path / "table.csv", HEADER, ROWS)
    return tmp_path


def test_a_table_is_read_for_each_task(cohort: Path) -> None:
    found = read_cohort(settings_of(cohort, cohort / "out"))
    assert found.slides == ("s0", "s1", "s2") and found.patients == ("p0", "p0", "p1")
    assert found.classes == ("no", "yes") and found.values.tolist() == [[1], [1], [0]]
    labels = read_cohort(settings_of(cohort, cohort / "out", task="multi-label"))
    assert labels.columns == ("label_a", "label_b") and labels.values.tolist() == [[1, 0], [0, 1], [1, 1]]
    times = read_cohort(settings_of(cohort, cohort / "out", task="survival", intervals=2))
    assert times.values.tolist() == [[3.5, 1], [3.5, 1], [7, 1]]
    numbers = read_cohort(settings_of(cohort, cohort / "out", task="regression", label_columns="time, label_a"))
    assert numbers.values.tolist() == [[3.5, 1], [3.5, 0], [7, 1]]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (("s0", "p1", "no", 1, 1, 7, 1), {}, "line 4: slide 's0' is on line 2 already"),
        (("s9", "p1", "no", 1, 1, 7, 1), {}, "line 4: slide 's9' has no file in"),
        (("s2", "", "no", 1, 1, 7, 1), {}, "line 4, column 'patient' is empty"),
        (("s2", "p1", "", 1, 1, 7, 1), {}, "line 4, column 'label' is empty"),
        (("s2", "p1", "NaN", 1, 1, 7, 1), {}, "line 4, column 'label' is 'NaN': expected a value"),
        (("s2", "nan", "no", 1, 1, 7, 1), {}, "line 4, column 'patient' is 'nan': expected a value"),
        (
            ("s2", "p0", "no", 1, 1, 7, 1),
            {"task": "survival"},
            "line 4: patient 'p0' has time 7 and event 1, on line 2 time 3.5 and event 1: expected the same",
        ),
        (
            ("s2", "p1", "no", 1, 0.5, 7, 1),
            {"task": "multi-label"},
            "line 4, column 'label_b' is '0.5': expected 0 or 1",
        ),
        (
            ("s2", "p1", "no", 1, 1, "x", 1),
            {"task": "survival"},
            "line 4, column 'time' is 'x': expected a finite number",
        ),
        (("s2", "p1", "no", 1, 1, -1, 1), {"task": "survival"}, "line 4, column 'time' is '-1': expected a time"),
        (("s2", "p1", "no", 1, 1, 7, 2), {"task": "survival"}, "line 4, column 'event' is '2': expected 0 or 1"),
        (
            ("s2.safetensors", "p1", "no", 1, 1, 7, 1),
            {},
            "line 4: slide 's2.safetensors' is written with its suffix: expected the name without .safetensors",
        ),
        (
            ("s2", "p1", "no", 1, 1, 7, 1),
            {"task": "survival"},
            "intervals=4: events have 2 different times in .*, column 'time': expected at most",
        ),
        (("s2", "p1", "yes", 1, 1, 7, 1), {}, "column 'label': every slide is 'yes': expected two classes"),
        (ROWS[2], {"label_columns": "grade"}, "has no column 'grade': its columns are"),
        (ROWS[2], {"label_columns": "label,label_a"}, "expected one column, or task='multi-label'"),
        (ROWS[2], {"patient_column": "case"}, "has no column 'case'"),
    ],
)
def test_errors_name_the_line_and_the_column(
    cohort: Path, row: tuple[object, ...], options: dict[str, str], message: str
) -> None:
    write_table(cohort / "table.csv", HEADER, [*ROWS[:2], row])
    with pytest.raises(ValueError, match=message.replace("(", "\\(")):
        read_cohort(settings_of(cohort, cohort / "out", **options))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide,label,label\ns0,a,b\n", "has several columns 'label': expected each name once"),
        ("slide,label, label\ns0,a,b\n", "has several columns 'label'"),
        ("slide,label\ns0,a\ns1,b,c\n", "line 3 has 3 cells: expected 2, as the header has"),
        ("slide,label\ns0,a\ns1\n", "line 3 has 1 cell: expected 2"),
        ('slide,label\ns0,"a\ns1,b\n', "is not a CSV file in UTF-8: unexpected end of data"),
        ("slide,label\n", "has no row"),
        ("", "has no row"),
    ],
)
def test_tables_have_each_column_once_and_a_cell_for_each(cohort: Path, text: str, message: str) -> None:
    (cohort / "table.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_cohort(settings_of(cohort, cohort / "out"))
    (cohort / "table.csv").write_text(text.replace("slide", "PATIENT").replace("label", "FILENAME"))
    with pytest.raises(ValueError, match=message.replace("label", "FILENAME")):
        read_patients(cohort / "table.csv", cohort)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide;label\ns0;0,5\ns1;1\n", "table.csv has semicolons between its columns: expected commas"),
        ("slide\tlabel\ns0\ta\ns1\tb\n", "has tabs between its columns: expected commas"),
        ("slide,label\ns0,0.5\ns1,1\ns2,2\n", "holds numbers with a fractional part, as 0.5 and 1: expected names"),
        ("slide,label\ns0,1\ns1,2\ns2,3\n", "3 classes for 3 patients: expected at most half .*, or task='regression'"),
        ("slide,label\ns0,x\ns1,y\ns2,z\n", "3 classes for 3 patients: expected at most half as many .* patients$"),
        ("slide,label\ns7,x\ns8,y\ns2,z\n", "line 3: slide 's8' has no file .*2 of 3 slides cannot be found"),
    ],
)
def test_tables_that_mean_something_else_are_refused(cohort: Path, text: str, message: str) -> None:
    (cohort / "table.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_cohort(settings_of(cohort, cohort / "out"))


def test_a_constant_number_names_its_column(cohort: Path) -> None:
    (cohort / "table.csv").write_text("slide,age,size\ns0,1,3\ns1,2,3\ns2,4,3\n")
    settings = settings_of(cohort, cohort / "out", task="regression", label_columns="age,size")
    with pytest.raises(ValueError, match=r"table\.csv, column 'size': every slide has 3: expected several values"):
        read_cohort(settings)
    (cohort / "table.csv").write_text("slide,age,size\ns0,1,3\ns1,2,3\ns2,4,5\n")
    with pytest.raises(
        ValueError, match=r"column 'size': every slide that trains in a fold has 3: expected .* fewer folds"
    ):
        FoldTask(settings, read_cohort(settings), (0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": None}, "expected a checkpoint, or dim and depth"),
        ({"checkpoint": "x.pth"}, "expected one of the two"),
        ({"task": "grading"}, "task='grading' is unknown: expected one of"),
        ({"read_out": "last"}, "read_out='last': expected whole numbers"),
        ({"task": "survival", "label_columns": "label"}, "expected time_column and event_column"),
        ({"folds": 1}, "folds=1: expected at least 2"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(tmp_path, tmp_path, **options)


def test_slides_lie_in_folders_and_hidden_files_are_named(cohort: Path) -> None:
    features = cohort / "features"
    (features / "site").mkdir()
    (features / "s1.safetensors").rename(features / "site" / "s1.safetensors")
    (features / "._s0.h5").write_bytes(b"of a Mac")
    # Results in the folder of slides are no slides.
    (features / "out").mkdir()
    (features / "out" / "s0.safetensors").write_bytes(b"a read-out")
    found = read_cohort(settings_of(cohort, features / "out"))
    assert found.paths[1] == features / "site" / "s1.safetensors" and found.hidden == ("._s0.h5",)
    with pytest.raises(
        ValueError,
        match=r"line 2: slide 's0' has several files, .*out/s0\.safetensors, .*: expected one of .*; features may be "
        r"\S*features/out or \S*features alone",
    ):
        read_cohort(settings_of(cohort, cohort / "out"))


def test_slides_are_read_in_the_unit_of_the_settings(tmp_path: Path) -> None:
    file, cell = tmp_path / "s.safetensors", torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    save_file({"features": torch.randn(2, 8), "coords": cell * 512}, file)
    for options in ({"unit": "um", "mpp": 2.0}, {"unit": "pixels", "tile_size": 512}):
        settings = settings_of(tmp_path, tmp_path, **options)
        coords = Tiles([file], settings, torch.device("cpu"))[0][1]
        assert torch.equal(coords[0] / (settings.tile_size or 256), cell)
    for options, message in [
        ({"unit": "feet"}, "unit='feet' is unknown"),
        ({"mpp": 0.5}, "with unit='um' alone"),
        ({"unit": "tiles", "tile_size": 512}, "tile_size=512 with unit='tiles': expected one of the two"),
    ]:
        with pytest.raises(ValueError, match=message):
            settings_of(tmp_path, tmp_path, **options)


@pytest.mark.parametrize("place", [-1.0, 256_000.0])
def test_a_tile_outside_of_the_grid_is_named_by_its_file(tmp_path: Path, place: float) -> None:
    file = tmp_path / "far.safetensors"
    save_file({"features": torch.randn(2, 8), "coords": torch.tensor([[0.0, 0.0], [0.0, place]])}, file)
    settings = settings_of(tmp_path, tmp_path)
    with pytest.raises(
        ValueError, match=r"far\.safetensors: tile 1 is at .* outside of the grid: expected .* below 256000"
    ):
        Tiles([file], settings, torch.device("cpu"))[0]


def synthetic(task: str, patients: int, seed: int = 0) -> Cohort:
    """Patients of one to three slides; targets of the patient."""
    draw = np.random.default_rng(seed)
    owners = np.repeat(np.arange(patients), draw.integers(1, 4, patients))
    of_patient = {
        "classification": draw.integers(0, 3, (patients, 1)),
        "multi-label": draw.integers(0, 2, (patients, 2)),
        "regression": draw.standard_normal((patients, 1)),
        "survival": np.stack([draw.exponential(10, patients), draw.integers(0, 2, patients)], 1),
    }[task]
    values = of_patient[owners].astype(float)
    names = tuple(f"s{n}" for n in range(len(owners)))
    classes = ("a", "b", "c") if task == "classification" else ()
    columns = tuple(f"t{n}" for n in range(values.shape[1]))
    return Cohort(names, tuple(f"p{n}" for n in owners), tuple(map(Path, names)), columns, values, classes, True)


@pytest.mark.parametrize("task", ["classification", "multi-label", "regression", "survival"])
@pytest.mark.parametrize("folds", [2, 5])
def test_no_patient_is_in_two_parts_and_each_slide_is_tested_once(tmp_path: Path, task: str, folds: int) -> None:
    cohort = synthetic(task, 40)
    settings = settings_of(tmp_path, tmp_path, task=task, folds=folds, validation=0.2)
    splits = make_splits(cohort, settings)
    assert sorted(n for split in splits for n in split.test) == list(range(len(cohort.slides)))
    for split in splits:
        parts = [{cohort.patients[n] for n in part} for part in (split.train, split.validation, split.test)]
        assert all(parts) and all(not one & other for one, other in combinations(parts, 2))
        assert sorted((*split.train, *split.validation, *split.test)) == list(range(len(cohort.slides)))
        if task == "classification":
            shares = [np.mean(cohort.values[list(part)] == kind) for part in (split.test,) for kind in range(3)]
            whole = [np.mean(cohort.values == kind) for kind in range(3)]
            assert np.abs(np.subtract(shares, whole)).max() < 0.2
    assert make_splits(cohort, settings) == splits
    assert make_splits(cohort, settings_of(tmp_path, tmp_path, task=task, folds=folds, seed=1)) != splits
    write_splits(tmp_path / "splits.csv", cohort, splits)
    assert read_splits(tmp_path / "splits.csv", cohort) == splits


def test_splits_of_two_parts_or_another_cohort_are_refused(tmp_path: Path) -> None:
    cohort, file = synthetic("classification", 40), tmp_path / "splits.csv"
    split = make_splits(cohort, settings_of(tmp_path, tmp_path))[0]
    twice = next(n for n in split.train if cohort.patients.count(cohort.patients[n]) > 1)
    leaked = Split(tuple(n for n in split.train if n != twice), split.validation, tuple(sorted((*split.test, twice))))
    write_splits(file, cohort, [leaked])
    with pytest.raises(ValueError, match="no patient in two"):
        read_splits(file, cohort)
    with pytest.raises(ValueError, match="other slides or patients"):
        read_splits(file, synthetic("classification", 30))
    with pytest.raises(ValueError, match="3 patients for 5 parts"):
        make_splits(synthetic("classification", 3), settings_of(tmp_path, tmp_path, folds=5))


def test_a_class_of_fewer_patients_than_folds_is_named(tmp_path: Path) -> None:
    whole = synthetic("classification", 40)
    values = whole.values % 2
    splits = make_splits(whole, settings_of(tmp_path, tmp_path, folds=5))
    cohort = replace(whole, values=values, classes=("a", "b"))
    assert rare_targets("classification", cohort, splits) == []
    alone = np.array([patient == "p0" for patient in whole.patients])
    cohort = replace(cohort, values=alone[:, None].astype(float))
    (note,) = rare_targets("classification", cohort, splits)
    untrained = sum(not alone[list(split.train)].any() for split in splits)
    assert note == (
        f"class 'b' has 1 patient, fewer than 5 folds: {untrained} of the folds do not train on it, 4 do not test it"
    )
    (note,) = rare_targets("survival", replace(cohort, values=np.stack([alone, alone], 1), classes=()), splits)
    assert note.startswith("the event has 1 patient, fewer than 5 folds")


def test_groups_of_risk_are_patients(tmp_path: Path) -> None:
    cohort = synthetic("survival", 12)
    settings = settings_of(tmp_path, tmp_path, task="survival", folds=2)
    splits = make_splits(cohort, settings)
    draw = np.random.default_rng(0)
    folds = [FoldResult([], 0, draw.random((len(split.test), 1)), {}) for split in splits]
    slides, high = risk_groups(Outcome(settings, cohort, splits, {"encoder": folds}, {}, {}))
    assert sorted(cohort.patients[n] for n in slides) == sorted(set(cohort.patients))
    for split, fold in zip(splits, folds, strict=True):
        owners = np.array([cohort.patients[n] for n in split.test])
        mean = {patient: fold.predictions[owners == patient].mean() for patient in set(owners)}
        for slide, above in zip(slides, high, strict=True):
            if (patient := cohort.patients[slide]) in mean:
                assert above == (mean[patient] > np.median(list(mean.values())))


@pytest.mark.parametrize("task", ["classification", "multi-label"])
def test_curves_are_the_mean_of_the_table(tmp_path: Path, task: str) -> None:
    cohort, draw = synthetic(task, 40), np.random.default_rng(0)
    # Scales of classes differ: pooled, they would give another curve.
    width = len(cohort.classes) or len(cohort.columns)
    known = (cohort.values == np.arange(width)) if cohort.classes else cohort.values
    predicted = (known + draw.random(known.shape)) * np.array([1.0, 0.1, 0.01])[:width]
    settings = settings_of(tmp_path, tmp_path, task=task)
    splits = make_splits(cohort, settings)
    folds = [
        FoldResult([], 0, predicted[list(s.test)], score(task, cohort.values[list(s.test)], predicted[list(s.test)]))
        for s in splits
    ]
    outcome = Outcome(settings, cohort, splits, {"encoder": folds}, {}, {})
    for metric, curve in (("auroc", roc_of), ("auprc", precision_of)):
        areas = [float(one.mean()) for one in curves_of(outcome, "encoder", curve)]
        assert areas == pytest.approx([fold.metrics[metric] for fold in folds], abs=0.01)
    assert combined(outcome) == ("mean of 3 classes, each against the others" if width == 3 else "mean of 2 labels")
    two = replace(outcome, cohort=replace(cohort, classes=("normal", "tumour")))
    assert combined(two) == "positive: tumour"


def pairs_in_order(first: np.ndarray, second: np.ndarray) -> float:
    """The share of pairs of which the second is larger; ties count a half."""
    return float(np.mean([[(b > a) + 0.5 * (a == b) for b in second] for a in first]))


def test_metrics_restated() -> None:
    draw = np.random.default_rng(0)
    truth, chance = draw.integers(0, 2, 30), draw.random(30).round(1)
    predicted = np.stack([1 - chance, chance], 1)
    found = score("classification", truth[:, None].astype(float), predicted)
    assert found["auroc"] == pytest.approx(pairs_in_order(chance[truth == 0], chance[truth == 1]))
    recalls = [np.mean(predicted.argmax(1)[truth == kind] == kind) for kind in (0, 1)]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    labels = np.stack([truth, np.ones(30)], 1)
    # The second label has no negative: it leaves the mean.
    assert score("multi-label", labels, np.stack([chance, chance], 1))["auroc"] == pytest.approx(found["auroc"])
    assert math.isnan(score("classification", np.zeros((3, 1)), predicted[:3])["auroc"])
    time, event, risk = draw.exponential(1, 30), draw.integers(0, 2, 30), draw.random(30)
    ordered = [(i, j) for i in range(30) for j in range(30) if event[i] and time[i] < time[j]]
    expected = np.mean([risk[i] > risk[j] for i, j in ordered])
    assert score("survival", np.stack([time, event], 1), risk[:, None])["c_index"] == pytest.approx(expected)
    numbers = draw.standard_normal((30, 1))
    r2 = score("regression", numbers, numbers + 1)["r2"]
    assert r2 == pytest.approx(1 - 30 / np.square(numbers - numbers.mean()).sum())


def test_the_interval_allows_for_shared_training_slides() -> None:
    values = [0.8, 0.9, math.nan, 0.7, 0.95]
    spread = np.std([0.8, 0.9, 0.7, 0.95], ddof=1)
    found = over_folds(values)
    assert found.mean == pytest.approx(0.8375)
    # The 97.5 % quantile of Student's t with 3 degrees of freedom, from its table.
    assert found.high - found.mean == pytest.approx(3.182446 * spread * math.sqrt(1 / 4 + 1 / 3), rel=1e-6)
    assert over_folds(values, 0, 1).high == 1.0
    assert math.isnan(over_folds([0.5]).low) and math.isnan(over_folds([math.nan]).mean)


def test_survival_has_quartiles_of_events_for_intervals(tmp_path: Path) -> None:
    cohort = synthetic("survival", 40)
    task = FoldTask(settings_of(tmp_path, tmp_path, task="survival"), cohort, range(len(cohort.slides)))
    assert task.outputs == 4
    events = np.sort(cohort.values[cohort.values[:, 1] == 1, 0])
    logits = torch.randn(1, 4, dtype=torch.float64)
    hazard = logits.sigmoid()[0]
    for slide in range(len(cohort.slides)):
        time, event = cohort.values[slide]
        interval = int(sum(time >= np.quantile(events, share) for share in (0.25, 0.5, 0.75)))
        survived = float((1 - hazard[:interval]).prod())
        likelihood = survived * float(hazard[interval] if event else 1 - hazard[interval])
        assert float(task.loss(logits, slide)) == pytest.approx(-math.log(likelihood))
    safe, doomed = torch.full((1, 4), -5.0), torch.full((1, 4), 5.0)
    assert task.predict(safe)[0, 0] < task.predict(doomed)[0, 0]


def test_numbers_are_scaled_by_the_training_slides(tmp_path: Path) -> None:
    cohort = synthetic("regression", 40)
    task = FoldTask(settings_of(tmp_path, tmp_path, task="regression"), cohort, range(10))
    seen = cohort.values[:10]
    output = torch.tensor([[0.3]])
    assert task.predict(output)[0, 0] == pytest.approx(0.3 * seen.std() + seen.mean())
    scaled = (cohort.values[20, 0] - seen.mean()) / seen.std()
    assert float(task.loss(output, 20)) == pytest.approx((0.3 - scaled) ** 2, rel=1e-5)


def test_baselines_restated() -> None:
    torch.manual_seed(0)
    x, nowhere = torch.randn(1, 5, 8, dtype=torch.float64), torch.zeros(1, 5, 2)
    model = AttentionPooling(8, 3, 0.0).double().eval()
    tiles = [model.project(tile) for tile in x[0]]
    scores = torch.stack([model.score(model.value(h).tanh() * model.gate(h).sigmoid()) for h in tiles]).exp()
    pooled = sum(w * h for w, h in zip(scores / scores.sum(), tiles, strict=True))
    torch.testing.assert_close(model(x, nowhere)[0], model.linear(pooled))
    mean = MeanPooling(8, 3, 0.0).double().eval()
    torch.testing.assert_close(mean(x, nowhere), mean.layers(sum(x[0])[None] / 5))


def test_every_process_gets_equally_many_slides() -> None:
    shares = []
    for rank in range(3):
        workers = Workers()
        workers.size, workers._rank = 3, rank
        shares.append(workers.share([4, 5, 6, 7]))
    assert shares == [[(4, True), (7, True)], [(5, True), (4, False)], [(6, True), (4, False)]]
