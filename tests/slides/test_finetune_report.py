"""What the report says: which weights the encoder had, which classes are defined, all targets, and how pictures are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetune_cohorts import settings_of
from sklearn.metrics import r2_score

from longnet.figures.style import new_figure
from longnet.slides.finetune.charts import _panels, combined
from longnet.slides.finetune.fit import Epoch
from longnet.slides.finetune.metrics import METRICS, Mean, by_target, score
from longnet.slides.finetune.outcome import FoldResult, Outcome, summarise
from longnet.slides.finetune.report import shown_settings, verdict, write_report
from longnet.slides.finetune.settings import FinetuneSettings
from longnet.slides.finetune.splits import Split
from longnet.slides.finetune.table import Cohort


def outcome_of(tmp_path: Path, task: str, values: np.ndarray, names: tuple[str, ...], **changes: Any) -> Outcome:
    """Random predictions of two folds of six slides; of each slide its own patient."""
    slides, draw = tuple(f"s{n}" for n in range(12)), np.random.default_rng(0)
    classes = names if task == "classification" else ()
    columns = ("label",) if classes else names
    cohort = Cohort(slides, slides, tuple(map(Path, slides)), columns, values.astype(float), classes, False)
    first, second = tuple(range(6)), tuple(range(6, 12))
    splits = [Split(second[:3], second[3:], first), Split(first[:3], first[3:], second)]
    width = 1 if task == "survival" else len(names)
    results: dict[str, list[FoldResult]] = {}
    for model in ("encoder", "mean_pooling"):
        drawn = [draw.random((6, width)) for _ in splits]
        results[model] = [
            FoldResult([Epoch(1.0, 1.0, 1e-3)], 0, one, score(task, cohort.values[list(split.test)], one))
            for split, one in zip(splits, drawn, strict=True)
        ]
    return summarise(settings_of(tmp_path, tmp_path, task=task, folds=2, **changes), cohort, splits, results)


def page_of(outcome: Outcome, out: Path) -> str:
    write_report(outcome, out)
    return (out / "report.html").read_text(encoding="utf-8")


ALTERNATING = np.arange(12) % 2


def test_random_weights_are_said_and_an_unused_architecture_is_not(tmp_path: Path) -> None:
    outcome = outcome_of(tmp_path, "classification", ALTERNATING[:, None], ("no", "yes"))
    page = page_of(outcome, tmp_path)
    assert "The slide encoder has random weights, no checkpoint: 1 layer of 32 channels." in page
    assert "gigapath" not in page and "<td>none: random weights</td>" in page
    assert "the slide encoder (random weights)" in verdict(outcome, "mean_pooling")
    # A value that is None is shown in words.
    assert dict(shown_settings(outcome.settings))["tile_size"] == "what the slide says, else 256"
    values = outcome.settings.to_dict() | {"checkpoint": "folder/weights.pth", "dim": None, "depth": None}
    trained = replace(outcome, settings=FinetuneSettings(**values | {"freeze": True}))
    page = page_of(trained, tmp_path)
    assert (
        "The slide encoder has the weights of weights.pth, of architecture gigapath_slide_enc12l768d; it is frozen"
        in page
    )
    assert "random weights" not in page and not {"dim", "depth"} & set(dict(shown_settings(trained.settings)))


def test_labels_that_are_defined_are_counted_and_each_has_its_metric(tmp_path: Path) -> None:
    never, once = np.zeros(12), np.arange(12) == 0
    outcome = outcome_of(tmp_path, "multi-label", np.stack([ALTERNATING, never], 1), ("label_a", "label_b"))
    assert combined(outcome) == "label_a, the only one of 2 labels that is defined"
    page = page_of(outcome, tmp_path)
    assert "Warning: label_b=1 has 0 patients, fewer than 2 folds" in page and "mean of 2 labels" not in page
    assert "<td>label_a</td>" in page and "<tr><td>mean pooling + MLP</td><td>label_b</td><td>–</td>" in page
    values = np.stack([ALTERNATING, never, once], 1)
    outcome = outcome_of(tmp_path, "multi-label", values, ("label_a", "label_b", "label_c"))
    assert combined(outcome) == "mean of 2 of 3 labels: label_a, label_c"
    classes = outcome_of(tmp_path, "classification", (np.arange(12) % 3)[:, None], ("a", "b", "c"))
    assert combined(classes) == "mean of 3 classes, each against the others"
    folds = classes.results["encoder"]
    found = [by_target("classification", classes.cohort.values[:6], folds[0].predictions)[n] for n in range(3)]
    assert np.mean(found) == pytest.approx(folds[0].metrics["auroc"])


def test_all_numbers_are_drawn_and_each_has_its_metric(tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal((12, 4))
    names = ("grade", "size", "age", "share")
    outcome = outcome_of(tmp_path, "regression", values, names, label_columns=",".join(names))
    assert len(_panels(outcome)) == 4
    page = page_of(outcome, tmp_path)
    assert "On the dashed line a prediction equals its target" in page and "R² of each target" in page
    predicted = outcome.results["encoder"][1].predictions
    assert f"{r2_score(values[6:, 3], predicted[:, 3]):.3f}" in page
    drawn: list[tuple[str, list[float]]] = []
    for _, draw in _panels(outcome):
        axes = new_figure(4, 4, "").subplots()
        draw(outcome, axes)
        drawn.append((axes.get_xlabel(), sorted(axes.lines[0].get_xdata())))
    assert drawn == [(f"target {name}", sorted(values[:, n])) for n, name in enumerate(names)]


def test_survival_says_what_bands_groups_and_times_are(tmp_path: Path) -> None:
    values = np.stack([np.arange(12) + 1, np.ones(12)], 1)
    page = page_of(outcome_of(tmp_path, "survival", values, ("months", "event")), tmp_path)
    for text in ("Bands are 95 % intervals", "above the median of their fold", "column &#x27;months&#x27;"):
        assert text in page


def test_a_difference_that_rounds_to_nothing_has_no_minus(tmp_path: Path) -> None:
    outcome = outcome_of(tmp_path, "classification", ALTERNATING[:, None], ("no", "yes"))
    metric = METRICS["classification"][0]
    nothing = replace(outcome, gains={"mean_pooling": {metric: Mean(-0.0001, -0.2, 0.2)}})
    assert "(difference +0.000, 95 % interval -0.200 to +0.200, which holds 0)" in verdict(nothing, "mean_pooling")
