"""The figures of a cross-validation as PNG files."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from longnet.figures.style import COLORS, FAINT, INK, legend, new_figure, quiet, save
from longnet.slides.finetune.metrics import METRICS, one_against_others
from longnet.slides.finetune.models import ENCODER, TITLES, titles_of
from longnet.slides.finetune.outcome import Outcome
from longnet.slides.folders import counted, listed

_COLORS = dict(zip(TITLES, (COLORS[0], COLORS[2], COLORS[3]), strict=True))
# The value of a metric of predictions that know nothing.
_CHANCE = {"auroc": 0.5, "c_index": 0.5, "r2": 0.0, "pearson": 0.0}


def plot_folds(outcome: Outcome, path: Path) -> Path:
    """Every metric by model: a dot for each fold, the mean with its 95 % interval."""
    metrics, models = METRICS[outcome.settings.task], list(outcome.results)
    figure = new_figure(10, 0.9 + 0.5 * len(models), "")
    for axes, metric in zip(np.atleast_1d(figure.subplots(1, len(metrics), sharey=True)), metrics, strict=True):
        quiet(axes)
        axes.set_title(title_of(metric), loc="left", fontsize=10, color=INK)
        axes.grid(axis="x", color="#e4e7eb", linewidth=0.8)
        for place, name in enumerate(models):
            mean, color = outcome.means[name][metric], _COLORS[name]
            values = [one.metrics[metric] for one in outcome.results[name]]
            axes.plot(
                [mean.low, mean.high], [place, place], color=color, linewidth=9, alpha=0.25, solid_capstyle="butt"
            )
            axes.plot(values, [place] * len(values), "o", color=color, markersize=4.5, alpha=0.75)
            axes.plot(mean.mean, place, "|", color=color, markersize=20, markeredgewidth=2.5)
        if metric in _CHANCE:
            axes.axvline(_CHANCE[metric], color=FAINT, linewidth=1, linestyle=(0, (5, 4)))
        axes.set_yticks(
            range(len(models)), [titles_of(outcome.settings)[name] for name in models], color=INK, fontsize=9
        )
        axes.set_ylim(len(models) - 0.4, -0.6)
    return save(figure, path)


def plot_losses(outcome: Outcome, path: Path) -> Path:
    """Training and validation loss by epoch, a panel for each model, a line for each fold; a ring at the epoch that was kept."""
    figure = new_figure(10, 3.4, "")
    panels = np.atleast_1d(figure.subplots(1, len(outcome.results)))
    for axes, (name, folds) in zip(panels, outcome.results.items(), strict=True):
        quiet(axes)
        axes.set_title(titles_of(outcome.settings)[name], loc="left", fontsize=10, color=INK)
        axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
        for fold in folds:
            epochs = range(1, len(fold.epochs) + 1)
            axes.plot(epochs, [one.train for one in fold.epochs], color=FAINT, linewidth=1, alpha=0.6)
            losses = [one.validation for one in fold.epochs]
            axes.plot(epochs, losses, color=_COLORS[name], linewidth=1.6)
            axes.plot(fold.best + 1, losses[fold.best], "o", color=_COLORS[name], markerfacecolor="white", markersize=6)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panels[0].set_ylabel("loss")
    legend(
        figure, [Patch(color=FAINT, label="training"), Patch(color=_COLORS[ENCODER], label="validation (in colour)")]
    )
    return save(figure, path)


def plot_predictions(outcome: Outcome, path: Path) -> Path:
    """What the task is read from: ROC and precision-recall curves, predictions against targets, or survival by risk."""
    panels = _panels(outcome)
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(10, (4.6 if columns < 3 else 3.8) * rows, "")
    places = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes, (title, draw) in zip(places, panels, strict=False):
        quiet(axes)
        axes.grid(color="#e4e7eb", linewidth=0.8)
        shown = ", ".join(filter(None, (title, combined(outcome))))
        axes.set_title(fill(shown, 60), loc="left", fontsize=10, color=INK, parse_math=False)
        draw(outcome, axes)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    if outcome.settings.task == "regression":
        titles = titles_of(outcome.settings)
        legend(figure, [Patch(color=_COLORS[name], label=titles[name]) for name in outcome.results])
    return save(figure, path)


def title_of(metric: str) -> str:
    """A metric's name as the report shows it."""
    names = {"auroc": "AUROC", "auprc": "AUPRC", "r2": "R²", "c_index": "c-index"}
    return names.get(metric, metric.replace("_", " "))


AT = np.linspace(0, 1, 201)
"""Where curves are averaged."""


def roc_of(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """True positive rates at the false positive rates :data:`AT`."""
    from sklearn.metrics import roc_curve

    return np.interp(AT, *roc_curve(truth, predicted)[:2])


def precision_of(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Precisions at the recalls :data:`AT`, in steps: their mean is the average precision."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(truth, predicted)
    return precision[::-1][np.searchsorted(recall[::-1], AT)]


Curve = Callable[[np.ndarray, np.ndarray], np.ndarray]


def curves_of(outcome: Outcome, name: str, curve: Curve) -> list[np.ndarray]:
    """A model's curve of each fold that defines one: the mean over classes or labels, those that the metrics average."""
    found = []
    for split, fold in zip(outcome.splits, outcome.results[name], strict=True):
        values = outcome.cohort.values[list(split.test)]
        pairs = one_against_others(outcome.settings.task, values, fold.predictions)
        if pairs:
            found.append(np.mean([curve(*pair) for pair in pairs.values()], 0))
    return found


def combined(outcome: Outcome) -> str:
    """Which class is positive, or which classes or labels are combined; empty for other tasks."""
    classes, columns, task = outcome.cohort.classes, outcome.cohort.columns, outcome.settings.task
    if task not in ("classification", "multi-label"):
        return ""
    if len(classes) == 2:
        return f"positive: {classes[1]}"
    if not classes and len(columns) == 1:
        return f"positive: {columns[0]} = 1"
    names, things = (classes, "classes") if classes else (columns, "labels")
    defined: set[int] = set()
    for split, fold in zip(outcome.splits, outcome.results[ENCODER], strict=True):
        defined |= set(one_against_others(task, outcome.cohort.values[list(split.test)], fold.predictions))
    against = ", each against the others" if classes else ""
    if len(defined) == len(names):
        return f"mean of {len(names)} {things}{against}"
    if not defined:
        return f"none of {len(names)} {things} is defined"
    # A longer list would leave the figure.
    shown = listed([names[n] for n in sorted(defined)], 3)
    if len(defined) == 1:
        return f"{shown}, the only one of {len(names)} {things} that is defined"
    return f"mean of {len(defined)} of {len(names)} {things}{against}: {shown}"


def _curves(outcome: Outcome, axes: Axes, curve: Curve) -> None:
    """A curve of each model and fold in pale, their mean in full."""
    for name in outcome.results:
        drawn = curves_of(outcome, name, curve)
        for one in drawn:
            axes.plot(AT, one, color=_COLORS[name], linewidth=0.8, alpha=0.25)
        if drawn:
            axes.plot(AT, np.mean(drawn, 0), color=_COLORS[name], linewidth=2, label=titles_of(outcome.settings)[name])
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.02)


def _roc(outcome: Outcome, axes: Axes) -> None:
    _curves(outcome, axes, roc_of)
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=(0, (5, 4)))
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate")
    axes.legend(loc="lower right", fontsize=9, labelcolor=INK, frameon=False)


def _precision_recall(outcome: Outcome, axes: Axes) -> None:
    _curves(outcome, axes, precision_of)
    axes.set_xlabel("recall")
    axes.set_ylabel("precision")


def _scatter(outcome: Outcome, axes: Axes, *, column: int) -> None:
    """Of one target, by all models."""
    targets = np.concatenate([outcome.cohort.values[list(split.test), column] for split in outcome.splits])
    for name, folds in outcome.results.items():
        predicted = np.concatenate([fold.predictions[:, column] for fold in folds])
        axes.plot(targets, predicted, "o", color=_COLORS[name], markersize=4, alpha=0.6)
    ends = [float(targets.min()), float(targets.max())]
    axes.plot(ends, ends, color=FAINT, linewidth=1, linestyle=(0, (5, 4)))
    axes.set_xlabel(f"target {outcome.cohort.columns[column]}")
    axes.set_ylabel("predicted")


def risk_groups(outcome: Outcome) -> tuple[np.ndarray, np.ndarray]:
    """(a slide of each patient, whether the mean risk of the patient's slides is above the median of the fold's patients)."""
    slides: list[int] = []
    high: list[bool] = []
    for split, fold in zip(outcome.splits, outcome.results[ENCODER], strict=True):
        risks: dict[str, list[float]] = {}
        first: dict[str, int] = {}
        for number, risk in zip(split.test, fold.predictions[:, 0].tolist(), strict=True):
            patient = outcome.cohort.patients[number]
            risks.setdefault(patient, []).append(risk)
            first.setdefault(patient, number)
        means = np.array([np.mean(of_patient) for of_patient in risks.values()])
        slides += first.values()
        high += (means > np.median(means)).tolist()
    return np.array(slides), np.array(high)


def _survival(outcome: Outcome, axes: Axes) -> None:
    """Kaplan-Meier curves of the encoder's halves: patients above and below the median risk of their fold."""
    from lifelines import KaplanMeierFitter

    thing = "patient" if outcome.cohort.has_patients else "slide"
    slides, high = risk_groups(outcome)
    for half, label, color in ((~high, "lower risk", COLORS[1]), (high, "higher risk", COLORS[3])):
        if not half.any():
            continue
        values = outcome.cohort.values[slides[half]]
        fitted = KaplanMeierFitter().fit(values[:, 0], values[:, 1])
        curve, bounds = fitted.survival_function_, fitted.confidence_interval_
        times = curve.index.to_numpy()
        axes.step(
            times,
            curve.to_numpy()[:, 0],
            where="post",
            color=color,
            label=f"{label} ({counted(int(half.sum()), thing)})",
        )
        low, top = bounds.to_numpy().T
        axes.fill_between(times, low, top, step="post", color=color, alpha=0.15, linewidth=0)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(outcome.cohort.columns[0])
    axes.set_ylabel("share without event")
    axes.legend(loc="upper right", fontsize=9, labelcolor=INK, frameon=False)


Panel = tuple[str, Callable[[Outcome, Axes], None]]


def _panels(outcome: Outcome) -> list[Panel]:
    """Titles and drawings of a task; of numbers, one for each target."""
    if outcome.settings.task == "survival":
        return [("Survival by the encoder's risk", _survival)]
    if outcome.settings.task == "regression":
        return [
            ("Predictions against targets" if column == 0 else "", partial(_scatter, column=column))
            for column in range(len(outcome.cohort.columns))
        ]
    return [("ROC", _roc), ("Precision and recall", _precision_recall)]
