"""What each task asks of a model in one fold: its number of outputs, its loss and its predictions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from longnet.gigapath import SurvivalHead
from longnet.gigapath.losses import classification_loss, regression_loss, survival_loss
from longnet.slides.finetune.settings import FinetuneSettings
from longnet.slides.finetune.table import Cohort


class FoldTask:
    """A task, with what it learns from the slides that train: the scale of numbers, the intervals of time.

    Args:
        cohort: all slides.
        train: the numbers of those that train.

    Attributes:
        outputs: of the model.
    """

    def __init__(self, settings: FinetuneSettings, cohort: Cohort, train: Sequence[int]) -> None:
        self.task, self._values = settings.task, cohort.values
        seen = cohort.values[list(train)]
        self.outputs = len(cohort.classes) or len(cohort.columns)
        if self.task == "regression":
            self._mean, self._scale = seen.mean(0), seen.std(0)
            for name, value, spread in zip(cohort.columns, self._mean, np.ptp(seen, 0), strict=True):
                if not spread:
                    raise ValueError(
                        f"{settings.table}, column {name!r}: every slide that trains in a fold has {value:g}: expected several "
                        "values, or fewer folds"
                    )
        if self.task == "survival":
            times = seen[seen[:, 1] == 1, 0]
            times = times if times.size else seen[:, 0]
            shares = np.arange(1, settings.intervals) / settings.intervals
            # Where times repeat, quantiles do: the intervals between equal ones are empty, and stay.
            self._edges = np.quantile(times, shares)
            self.outputs = settings.intervals

    def loss(self, outputs: Tensor, slide: int) -> Tensor:
        """The loss of one slide; outputs (1, K)."""
        value, device = self._values[slide], outputs.device
        if self.task == "classification":
            return classification_loss(outputs, torch.tensor([int(value[0])], device=device), "multi_class")
        if self.task == "multi-label":
            target = torch.tensor(value[None], dtype=torch.float32, device=device)
            return classification_loss(outputs, target, "multi_label")
        if self.task == "regression":
            scaled = (value - self._mean) / self._scale
            return regression_loss(outputs, torch.tensor(scaled[None], dtype=torch.float32, device=device))
        interval = torch.tensor([int(np.searchsorted(self._edges, value[0], side="right"))], device=device)
        return survival_loss(outputs, interval, torch.tensor([bool(value[1])], device=device))

    def predict(self, outputs: Tensor) -> np.ndarray:
        """(slides, K) outputs to (slides, columns) float64: probabilities, numbers, or the risk (larger: an earlier event)."""
        outputs = outputs.double()
        if self.task == "classification":
            return outputs.softmax(1).numpy()
        if self.task == "multi-label":
            return outputs.sigmoid().numpy()
        if self.task == "regression":
            return outputs.numpy() * self._scale + self._mean
        # Expected number of intervals survived, negated.
        return -SurvivalHead.survival(outputs).double().sum(1, keepdim=True).numpy()


def prediction_columns(task: str, cohort: Cohort) -> list[str]:
    """Names for the columns of :meth:`FoldTask.predict`."""
    if task == "survival":
        return ["risk"]
    names = cohort.classes or cohort.columns
    return [f"{'predicted' if task == 'regression' else 'probability'}_{name}" for name in names]
