"""The report of a cross-validation: one HTML page with its figures embedded."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

from longnet.slides.finetune.charts import combined, plot_folds, plot_losses, plot_predictions, title_of
from longnet.slides.finetune.metrics import METRICS, RANGES, Mean, by_target, over_folds
from longnet.slides.finetune.models import ENCODER, RANDOM, TITLES, describe_encoder, titles_of
from longnet.slides.finetune.outcome import Outcome
from longnet.slides.finetune.settings import FinetuneSettings
from longnet.slides.finetune.splits import rare_targets
from longnet.slides.finetune.tasks import prediction_columns
from longnet.slides.folders import counted
from longnet.training.files import write_text
from longnet.training.page import Page

_SHOWN_SLIDES = 200


def write_report(outcome: Outcome, out: Path) -> None:
    """Draw ``metrics.png``, ``predictions.png`` and ``losses.png``, and write ``report.html`` into ``out``."""
    settings, cohort, main = outcome.settings, outcome.cohort, METRICS[outcome.settings.task][0]
    events = f", {counted(int(cohort.values[:, 1].sum()), 'event')}" if settings.task == "survival" else ""
    page = Page(
        "Fine-tuning of a slide encoder",
        f"{settings.task} of {', '.join(cohort.columns)}: {counted(len(cohort.slides), 'slide')} of "
        f"{counted(len(set(cohort.patients)), 'patient')}{events}, {len(outcome.splits)} folds by patient",
    )
    titles = titles_of(settings)
    page.cards(
        (_number(means[main].mean), f"{title_of(main)}, {titles[name]}") for name, means in outcome.means.items()
    )
    page.text(describe_encoder(settings))
    for note in rare_targets(settings.task, cohort, outcome.splits):
        page.text(f"Warning: {note}.")
    if outcome.gains:
        page.heading("Does the slide encoder help?")
        for name in outcome.gains:
            page.text(verdict(outcome, name), "verdict")
    page.heading("Metrics by fold")
    page.picture(plot_folds(outcome, out / "metrics.png"), "Metrics of every model and fold")
    page.text(
        "A dot is a fold, the stroke the mean, the band its 95 % interval; the dashed line is chance. Every test slide was "
        "predicted by a model that has seen no slide of its patient. Training sets of folds overlap; the interval allows for "
        "that (Nadeau and Bengio 2003). A value that a fold does not define is shown as – and left out of the mean.",
        "soft",
    )
    _metric_tables(page, outcome)
    _target_table(page, outcome)
    page.heading("Predictions")
    page.picture(plot_predictions(outcome, out / "predictions.png"), "Predictions of the test slides")
    page.text(_under_predictions(outcome), "soft")
    page.heading("Training")
    page.picture(plot_losses(outcome, out / "losses.png"), "Losses by epoch")
    page.text(
        "A line is a fold. A ring marks the epoch of lowest validation loss, whose weights predict the test slides.",
        "soft",
    )
    _slides(page, outcome)
    page.heading("Settings")
    page.table(shown_settings(settings))
    write_text(out / "report.html", page.html())


def verdict(outcome: Outcome, baseline: str) -> str:
    """Whether the encoder is better than a baseline by the task's first metric, as one sentence made from the numbers."""
    metric = METRICS[outcome.settings.task][0]
    gain, other = outcome.gains[baseline][metric], TITLES[baseline]
    encoder = titles_of(outcome.settings)[ENCODER]
    shown = f"{title_of(metric)} {_interval(outcome.means[ENCODER][metric])} against {_interval(outcome.means[baseline][metric])}"
    if math.isnan(gain.low):
        return f"Undecided, the {encoder} against {other}: fewer than two folds define the {title_of(metric)} of both."
    mean, low, high = (_number(one, "+") for one in (gain.mean, gain.low, gain.high))
    difference = f"difference {mean}, 95 % interval {low} to {high}"
    if gain.low > 0:
        return f"Yes, the {encoder} is better than {other}: {shown} ({difference})."
    if gain.high < 0:
        return f"No, the {encoder} is worse than {other}: {shown} ({difference})."
    return f"Undecided, the {encoder} against {other}: {shown} ({difference}, which holds 0)."


def _metric_tables(page: Page, outcome: Outcome) -> None:
    folds = [f"fold {number}" for number in range(len(outcome.splits))]
    rows = [
        (
            titles_of(outcome.settings)[name],
            title_of(metric),
            *(_number(one.metrics[metric]) for one in results),
            _interval(outcome.means[name][metric]),
        )
        for name, results in outcome.results.items()
        for metric in METRICS[outcome.settings.task]
    ]
    page.grid(("model", "metric", *folds, "mean (95 % interval)"), rows)


def _target_table(page: Page, outcome: Outcome) -> None:
    """The first metric of each class, label or number, where it is a mean of several."""
    task, cohort = outcome.settings.task, outcome.cohort
    names, kind = (cohort.classes, "class") if cohort.classes else (cohort.columns, "label")
    if task == "survival" or len(names) == 1 or len(cohort.classes) == 2:
        return
    rows, metric = [], METRICS[task][0]
    for model, folds in outcome.results.items():
        found = [
            by_target(task, cohort.values[list(split.test)], fold.predictions)
            for split, fold in zip(outcome.splits, folds, strict=True)
        ]
        for place, name in enumerate(names):
            values = [one.get(place, math.nan) for one in found]
            mean = _interval(over_folds(values, *RANGES[metric]))
            rows.append((titles_of(outcome.settings)[model], name, *map(_number, values), mean))
    folds_named = (f"fold {number}" for number in range(len(outcome.splits)))
    kind = "target" if task == "regression" else kind
    page.text(f"{title_of(metric)} of each {kind}:")
    page.grid(("model", kind, *folds_named, "mean (95 % interval)"), rows)


def _under_predictions(outcome: Outcome) -> str:
    """How the figure of predictions is read."""
    cohort = outcome.cohort
    if outcome.settings.task == "survival":
        things = "patients" if cohort.has_patients else "slides"
        risk = "the mean risk of whose slides" if cohort.has_patients else "whose risk"
        return (
            f"Kaplan-Meier curves of the test {things} of all folds. Higher risk: {things} {risk}, as the slide encoder predicts "
            f"it, is above the median of their fold; lower risk: all others. Bands are 95 % intervals. Time is in the unit of "
            f"the table's column {cohort.columns[0]!r}."
        )
    if outcome.settings.task == "regression":
        return "A dot is a test slide. On the dashed line a prediction equals its target."
    return (
        f"Curves: {combined(outcome)}. Pale ones are of a fold, the others their mean. A class or label that all or no test "
        "slides of a fold have is left out there, as in the table."
    )


def shown_settings(settings: FinetuneSettings) -> list[tuple[str, str]]:
    """Every setting that was used and its value; in words where the value is None."""
    unused = ("dim", "depth") if settings.checkpoint else ("arch",)
    rows = []
    for one in fields(settings):
        value = getattr(settings, one.name)
        if one.name == "checkpoint" and value is None:
            value = f"none: {RANDOM}"
        if one.name not in unused:
            rows.append((one.name, str(value if value is not None else one.metadata["shown"])))
    return rows


def _slides(page: Page, outcome: Outcome) -> None:
    """The encoder's predictions of the slides, in the order of the folds."""
    cohort, columns = outcome.cohort, prediction_columns(outcome.settings.task, outcome.cohort)
    rows = []
    for fold, (split, result) in enumerate(zip(outcome.splits, outcome.results[ENCODER], strict=True)):
        for number, predicted in zip(split.test, result.predictions, strict=True):
            values = cohort.values[number]
            target = (cohort.classes[int(values[0])],) if cohort.classes else tuple(f"{value:g}" for value in values)
            row = (cohort.slides[number], cohort.patients[number], str(fold), *target)
            rows.append((*row, *(f"{value:.3g}" for value in predicted)))
    page.heading("Slides")
    shown = f"The first {_SHOWN_SLIDES} of {len(rows):,} slides; all, also those of the baselines, are"
    page.text(
        f"{shown if len(rows) > _SHOWN_SLIDES else 'Also those of the baselines are'} in predictions.csv.", "soft"
    )
    page.grid(("slide", "patient", "fold", *cohort.columns, *columns), rows[:_SHOWN_SLIDES])


def _number(value: float, sign: str = "") -> str:
    # What rounds to zero has no sign of its own: 0.0 is added, as -0.0 + 0.0 is 0.0.
    return "–" if math.isnan(value) else f"{round(value, 3) + 0.0:{sign}.3f}"


def _interval(mean: Mean) -> str:
    if math.isnan(mean.low):
        return _number(mean.mean)
    return f"{_number(mean.mean)} ({_number(mean.low)} to {_number(mean.high)})"
