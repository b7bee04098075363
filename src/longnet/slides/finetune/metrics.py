"""Metrics of predictions on a test part, by scikit-learn and lifelines, and their mean over folds with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

METRICS = {
    "classification": ("auroc", "auprc", "balanced_accuracy"),
    "multi-label": ("auroc", "auprc", "balanced_accuracy"),
    "regression": ("r2", "mean_absolute_error", "pearson"),
    "survival": ("c_index",),
}
"""By task; the first is the one that the report draws."""

RANGES = {"auroc": (0.0, 1.0), "auprc": (0.0, 1.0), "balanced_accuracy": (0.0, 1.0), "c_index": (0.0, 1.0)} | {
    "r2": (-math.inf, 1.0),
    "mean_absolute_error": (0.0, math.inf),
    "pearson": (-1.0, 1.0),
}


@dataclass(frozen=True)
class Mean:
    """A mean over folds with its 95 % interval; nan without two folds."""

    mean: float
    low: float
    high: float


def score(task: str, values: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """The metrics of a task, nan where one is not defined.

    AUROC, AUPRC and, for labels, balanced accuracy (at 0.5) are means over classes or labels; of two classes those of the second.
    A class or label that the slides have not, or that all have, leaves the mean: it has no AUROC. The c-index is Harrell's.

    Args:
        values, predicted: of the test slides, see :class:`Cohort` and :meth:`FoldTask.predict`.
    """
    if task == "survival":
        return {"c_index": _c_index(values, predicted[:, 0])}
    if task == "regression":
        return _of_numbers(values, predicted)
    from sklearn.metrics import average_precision_score, recall_score, roc_auc_score

    both = one_against_others(task, values, predicted)
    if task == "classification":
        classes = predicted.shape[1]
        truth = (values == np.arange(classes)).astype(int)
        present = [number for number in range(classes) if truth[:, number].any()]
        chosen = predicted.argmax(1)
        recalls = [recall_score(truth[:, n], chosen == n) for n in present]
    else:
        truth = values.astype(int)
        recalls = [
            recall_score(truth[:, n], predicted[:, n] >= 0.5, average="macro")
            for n in range(values.shape[1])
            if 0 < truth[:, n].sum() < len(truth)
        ]
    return {
        "auroc": _mean([roc_auc_score(truth, chances) for truth, chances in both.values()]),
        "auprc": _mean([average_precision_score(truth, chances) for truth, chances in both.values()]),
        "balanced_accuracy": _mean(recalls),
    }


def one_against_others(
    task: str, values: np.ndarray, predicted: np.ndarray
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """(0 or 1 of each slide, its probability) by the number of each class or label that some slides have and some have not.

    Of two classes the second alone.
    """
    classes = predicted.shape[1]
    truth = (values == np.arange(classes)).astype(int) if task == "classification" else values.astype(int)
    scored = [1] if task == "classification" and classes == 2 else range(classes)
    return {n: (truth[:, n], predicted[:, n]) for n in scored if 0 < truth[:, n].sum() < len(truth)}


def by_target(task: str, values: np.ndarray, predicted: np.ndarray) -> dict[int, float]:
    """AUROC of each class or label, R² of each number, by its place; without those that the slides do not define."""
    from sklearn.metrics import r2_score, roc_auc_score

    if task == "regression":
        varied = [n for n in range(values.shape[1]) if np.ptp(values[:, n])]
        return {n: float(r2_score(values[:, n], predicted[:, n])) for n in varied}
    return {n: float(roc_auc_score(*pair)) for n, pair in one_against_others(task, values, predicted).items()}


def over_folds(values: Sequence[float], least: float = -math.inf, most: float = math.inf) -> Mean:
    """Mean and 95 % interval of one value a fold: Student's t with the variance of Nadeau and Bengio (2003).

    Training sets of folds overlap, so values are not independent: the variance of the mean is ``(1 / k + 1 / (k - 1)) s ** 2``,
    where 1 / (k - 1) is the ratio of test to training slides. Values that are nan are left out. The interval is cut to
    ``least`` and ``most``.
    """
    from scipy.stats import t

    defined = np.array([value for value in values if not math.isnan(value)])
    if len(defined) < 2:
        return Mean(float(defined.mean()) if len(defined) else math.nan, math.nan, math.nan)
    k = len(defined)
    half = float(t.ppf(0.975, k - 1)) * float(defined.std(ddof=1)) * math.sqrt(1 / k + 1 / (k - 1))
    mean = float(defined.mean())
    return Mean(mean, max(mean - half, least), min(mean + half, most))


def _of_numbers(values: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import mean_absolute_error, r2_score

    constant = [n for n in range(values.shape[1]) if np.ptp(values[:, n]) == 0]
    flat = [n for n in range(values.shape[1]) if np.ptp(predicted[:, n]) == 0]
    pairs = [n for n in range(values.shape[1]) if n not in constant and n not in flat]
    return {
        "r2": math.nan if constant else float(r2_score(values, predicted)),
        "mean_absolute_error": float(mean_absolute_error(values, predicted)),
        "pearson": _mean([np.corrcoef(values[:, n], predicted[:, n])[0, 1] for n in pairs]),
    }


def _c_index(values: np.ndarray, risk: np.ndarray) -> float:
    from lifelines.utils import concordance_index

    try:
        return float(concordance_index(values[:, 0], -risk, values[:, 1]))
    except ZeroDivisionError:
        # No two slides of which one is known to have had its event first.
        return math.nan


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan
