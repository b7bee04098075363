"""The report of a cross-validation: one HTML page with its figures embedded."""

from __future__ import annotations

import math
from pathlib import Path

from longnet.slides.finetune.charts import combined, plot_folds, plot_losses, plot_predictions, title_of
from longnet.slides.finetune.metrics import METRICS, Mean
from longnet.slides.finetune.models import ENCODER, TITLES
from longnet.slides.finetune.outcome import Outcome
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
    page.cards(
        (_number(means[main].mean), f"{title_of(main)}, {TITLES[name]}") for name, means in outcome.means.items()
    )
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
    page.heading("Predictions")
    page.picture(plot_predictions(outcome, out / "predictions.png"), "Predictions of the test slides")
    if how := combined(outcome):
        page.text(
            f"Curves are {how}; pale ones are of a fold, the others their mean. A class or label that all or no test slides of "
            "a fold have is left out there, as in the table.",
            "soft",
        )
    page.heading("Training")
    page.picture(plot_losses(outcome, out / "losses.png"), "Losses by epoch")
    page.text(
        "A line is a fold. A ring marks the epoch of lowest validation loss, whose weights predict the test slides.",
        "soft",
    )
    _slides(page, outcome)
    page.heading("Settings")
    page.table((name, value) for name, value in settings.to_dict().items() if value is not None)
    write_text(out / "report.html", page.html())


def verdict(outcome: Outcome, baseline: str) -> str:
    """Whether the encoder is better than a baseline by the task's first metric, as one sentence made from the numbers."""
    metric = METRICS[outcome.settings.task][0]
    gain, other = outcome.gains[baseline][metric], TITLES[baseline]
    shown = f"{title_of(metric)} {_interval(outcome.means[ENCODER][metric])} against {_interval(outcome.means[baseline][metric])}"
    if math.isnan(gain.low):
        return f"Undecided against {other}: fewer than two folds define the {title_of(metric)} of both."
    difference = f"difference {gain.mean:+.3f}, 95 % interval {gain.low:+.3f} to {gain.high:+.3f}"
    if gain.low > 0:
        return f"Yes, better than {other}: {shown} ({difference})."
    if gain.high < 0:
        return f"No, worse than {other}: {shown} ({difference})."
    return f"Undecided against {other}: {shown} ({difference}, which holds 0)."


def _metric_tables(page: Page, outcome: Outcome) -> None:
    folds = [f"fold {number}" for number in range(len(outcome.splits))]
    rows = [
        (
            TITLES[name],
            title_of(metric),
            *(_number(one.metrics[metric]) for one in results),
            _interval(outcome.means[name][metric]),
        )
        for name, results in outcome.results.items()
        for metric in METRICS[outcome.settings.task]
    ]
    page.grid(("model", "metric", *folds, "mean (95 % interval)"), rows)


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


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _interval(mean: Mean) -> str:
    if math.isnan(mean.low):
        return _number(mean.mean)
    return f"{mean.mean:.3f} ({mean.low:.3f} to {mean.high:.3f})"
