"""Whole runs: a planted signal is found and nothing else is, a stopped run gives the same numbers, all tasks are reported."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from finetune_cohorts import make_cohort, settings_of, write_table
from safetensors.torch import load_file

from longnet.gigapath import ClassificationHead, SlideEncoder
from longnet.slides import read_slide
from longnet.slides.finetune import FinetuneSettings, finetune
from longnet.slides.finetune.fit import Stopped


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cohort(tmp_path_factory.mktemp("inputs") / "cohort", "--tiles", 40)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs") / "small"
    return make_cohort(folder, "--patients", 16, "--tiles", 10, "--channels", 8, "--slides", 2)


def numbers(out: Path) -> dict[str, object]:
    return json.loads((out / "metrics.json").read_text())


def planted(cohort: Path, out: Path) -> FinetuneSettings:
    return settings_of(cohort, out, epochs=8, folds=3, patience=8)


def test_a_planted_signal_is_found(cohort: Path, tmp_path: Path) -> None:
    outcome = finetune(planted(cohort, tmp_path / "out"))
    assert outcome.means["encoder"]["auroc"].mean > 0.95


def test_without_the_signal_chance_is_within_the_interval(tmp_path: Path) -> None:
    quiet = make_cohort(tmp_path / "quiet", "--tiles", 40, "--no-signal")
    mean = finetune(planted(quiet, tmp_path / "out")).means["encoder"]["auroc"]
    assert mean.low < 0.5 < mean.high and mean.mean < 0.75


@pytest.mark.parametrize("freeze", [False, True])
def test_a_run_that_was_stopped_goes_on_with_the_same_numbers(small: Path, tmp_path: Path, freeze: bool) -> None:
    # Random numbers matter: with dropout, in every epoch.
    options = {"freeze": freeze, "dropout": 0.2, "drop_path": 0.2, "baselines": True, "depth": 2}
    whole = finetune(settings_of(small, tmp_path / "whole", **options))
    settings, stops = settings_of(small, tmp_path / "stopped", **options), 0
    while True:
        try:
            # One epoch a call.
            finetune(settings, should_stop=lambda: True)
            break
        except Stopped:
            stops += 1
    assert stops >= 6
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")
    texts = [(tmp_path / name / "predictions.csv").read_text() for name in ("stopped", "whole")]
    assert texts[0] == texts[1]
    for name in ("fold-0/encoder.safetensors", "fold-1/abmil.safetensors"):
        before, after = load_file(tmp_path / "whole" / name), load_file(tmp_path / "stopped" / name)
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert [fold.best for fold in whole.results["encoder"]] and not list((tmp_path / "stopped").rglob("*.state.*"))


def test_the_weights_of_a_fold_give_its_predictions(small: Path, tmp_path: Path) -> None:
    finetune(settings_of(small, tmp_path))
    head = ClassificationHead(SlideEncoder(32, 1, in_dim=8), 2).eval()
    head.load_state_dict(load_file(tmp_path / "fold-1" / "encoder.safetensors"))
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["fold"] == "1"]
    assert {row["model"] for row in rows} == {"encoder"} and len(rows) > 4
    for row in rows[:4]:
        slide = read_slide(small / "features" / f"{row['slide']}.safetensors")
        with torch.no_grad():
            expected = head(slide.embeddings[None], slide.coords[None]).softmax(1)[0].tolist()
        assert [float(row["probability_normal"]), float(row["probability_tumour"])] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("task", "options", "shown"),
    [
        ("classification", {}, ("AUROC", "balanced accuracy")),
        ("multi-label", {}, ("AUPRC", "probability_label_b")),
        ("regression", {"label_columns": "score"}, ("R²", "mean absolute error")),
        ("survival", {}, ("c-index", "risk")),
    ],
)
def test_every_task_is_reported_beside_its_baselines(
    small: Path, tmp_path: Path, task: str, options: dict[str, str], shown: tuple[str, ...]
) -> None:
    outcome = finetune(settings_of(small, tmp_path, task=task, epochs=1, baselines=True, **options))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in ("slide encoder", "mean pooling + MLP", "ABMIL", "Does the slide encoder help?", "P003-1", *shown):
        assert text in page
    assert page.count("data:image/png;base64,") == 3
    rows = list(csv.DictReader((tmp_path / "predictions.csv").read_text().splitlines()))
    assert len(rows) == 3 * 32 and all(sum(row["slide"] == "P003-1" for row in rows) == 3 for _ in (0,))
    assert set(outcome.gains) == {"mean_pooling", "abmil"}


def test_another_run_or_another_folder_is_refused(small: Path, tmp_path: Path) -> None:
    settings = settings_of(small, tmp_path / "out", epochs=1)
    finetune(settings)
    with pytest.raises(ValueError, match="seed was 0, now 1. Expected the same settings and files, or another --out"):
        finetune(settings_of(small, tmp_path / "out", epochs=1, seed=1))
    (tmp_path / "out" / "fold-1" / "encoder.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"encoder\.json is damaged \(KeyError.*remove the folder .*fold-1, and the same"
    ):
        finetune(settings)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files: expected a new or empty folder"):
        finetune(settings_of(small, tmp_path / "mine", epochs=1))
    table = tmp_path / "table.csv"
    write_table(table, ["slide", "label"], [["P000-0", "a"], ["P001-0", "b"]])
    changed = FinetuneSettings(**settings.to_dict() | {"table": str(table)})
    with pytest.raises(ValueError, match="the table's contents changed"):
        finetune(changed)


def test_slides_of_other_channels_are_named(small: Path, tmp_path: Path) -> None:
    features = tmp_path / "features"
    features.mkdir()
    for path in (small / "features").iterdir():
        (features / path.name).write_bytes(path.read_bytes())
    torch.save({"features": torch.randn(3, 9), "coords": torch.zeros(3, 2)}, features / "P001-0.pt")
    (features / "P001-0.safetensors").unlink()
    settings = FinetuneSettings(**settings_of(small, tmp_path / "out").to_dict() | {"features": str(features)})
    with pytest.raises(ValueError, match="P001-0.pt has tiles of 9 channels: expected 8, as 31 of 32"):
        finetune(settings)
