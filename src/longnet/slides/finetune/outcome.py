"""The results of a cross-validation, their means over folds, and the files that hold them."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longnet.slides.finetune.fit import Epoch
from longnet.slides.finetune.metrics import METRICS, RANGES, Mean, over_folds
from longnet.slides.finetune.models import ENCODER, describe_encoder
from longnet.slides.finetune.settings import FinetuneSettings
from longnet.slides.finetune.splits import Split
from longnet.slides.finetune.table import Cohort
from longnet.slides.finetune.tasks import prediction_columns
from longnet.training.files import write_text


@dataclass(frozen=True)
class FoldResult:
    """A trained model on one fold: its epochs, the number of the best, predictions of the test slides, their metrics."""

    epochs: list[Epoch]
    best: int
    predictions: np.ndarray
    metrics: dict[str, float]


@dataclass(frozen=True)
class Outcome:
    """All results of a run.

    Attributes:
        results: by the name of a model, one for each fold.
        means: by the name of a model and a metric, over folds.
        gains: by the name of a baseline and a metric: the encoder's less the baseline's, paired by fold.
    """

    settings: FinetuneSettings
    cohort: Cohort
    splits: list[Split]
    results: dict[str, list[FoldResult]]
    means: dict[str, dict[str, Mean]]
    gains: dict[str, dict[str, Mean]]


def summarise(
    settings: FinetuneSettings, cohort: Cohort, splits: list[Split], results: dict[str, list[FoldResult]]
) -> Outcome:
    """The means and gains of results."""
    metrics = METRICS[settings.task]
    by_fold = {name: {m: [one.metrics[m] for one in folds] for m in metrics} for name, folds in results.items()}
    means = {
        name: {m: over_folds(values, *RANGES[m]) for m, values in found.items()} for name, found in by_fold.items()
    }
    gains = {
        name: {m: over_folds((np.array(by_fold[ENCODER][m]) - np.array(found[m])).tolist()) for m in metrics}
        for name, found in by_fold.items()
        if name != ENCODER
    }
    return Outcome(settings, cohort, splits, results, means, gains)


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The content of ``metrics.json``."""
    models = {
        name: {
            "folds": [{m: _plain(value) for m, value in one.metrics.items()} for one in folds],
            "means": {m: _mean(mean) for m, mean in outcome.means[name].items()},
        }
        for name, folds in outcome.results.items()
    }
    gains = {name: {m: _mean(mean) for m, mean in found.items()} for name, found in outcome.gains.items()}
    encoder = describe_encoder(outcome.settings)
    return {"task": outcome.settings.task, "encoder": encoder, "models": models, "encoder_less_baseline": gains}


def _mean(mean: Mean) -> dict[str, float | None]:
    return {name: _plain(value) for name, value in asdict(mean).items()}


def _plain(value: float) -> float | None:
    """JSON has no nan."""
    return None if math.isnan(value) else value


def write_predictions(path: Path, outcome: Outcome) -> None:
    """A CSV with a row for each model and test slide: model, slide, patient, fold, targets, predictions."""
    cohort, text = outcome.cohort, io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = prediction_columns(outcome.settings.task, cohort)
    writer.writerow(["model", "slide", "patient", "fold", *(f"target_{name}" for name in cohort.columns), *columns])
    for name, folds in outcome.results.items():
        for fold, (split, result) in enumerate(zip(outcome.splits, folds, strict=True)):
            for number, predicted in zip(split.test, result.predictions.tolist(), strict=True):
                values = cohort.values[number].tolist()
                target = [cohort.classes[int(values[0])]] if cohort.classes else values
                writer.writerow([name, cohort.slides[number], cohort.patients[number], fold, *target, *predicted])
    write_text(path, text.getvalue())
