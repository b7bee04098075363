"""Folds of a cross-validation: by patient, stratified by the target, seeded. Nobody is in two parts of a fold."""

from __future__ import annotations

import csv
import io
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longnet.slides.finetune.settings import FinetuneSettings
from longnet.slides.finetune.table import Cohort
from longnet.slides.folders import counted
from longnet.training.files import write_text

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """One fold: numbers of slides, rising. Training stops early by ``validation``; ``test`` is only predicted."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


def strata(task: str, values: np.ndarray) -> np.ndarray:
    """A number for each slide to keep in proportion: class, set of labels, quarter of the first number, or event."""
    if task == "regression":
        return np.digitize(values[:, 0], np.quantile(values[:, 0], (0.25, 0.5, 0.75)))
    chosen = values[:, 1:2] if task == "survival" else values
    return np.unique(chosen, axis=0, return_inverse=True)[1].reshape(-1)


def make_splits(cohort: Cohort, settings: FinetuneSettings) -> list[Split]:
    """``settings.folds`` splits, each slide in one test part, by scikit-learn's StratifiedGroupKFold.

    The validation part is one of ``round(1 / settings.validation)`` such parts of the patients that train.

    Raises:
        ValueError: fewer patients than parts.
    """
    groups = np.array(cohort.patients)
    kinds = strata(settings.task, cohort.values)
    splits = []
    everything = np.arange(len(groups))
    for fold, test in enumerate(_parts(everything, groups, kinds, settings.folds, settings.seed)):
        rest = np.setdiff1d(everything, test)
        validation = _parts(rest, groups, kinds, round(1 / settings.validation), settings.seed + 1 + fold)[0]
        train = np.setdiff1d(rest, validation)
        splits.append(Split(*(tuple(int(n) for n in part) for part in (train, validation, test))))
    return splits


def _parts(chosen: np.ndarray, groups: np.ndarray, kinds: np.ndarray, parts: int, seed: int) -> list[np.ndarray]:
    from sklearn.model_selection import StratifiedGroupKFold

    patients = len(set(groups[chosen]))
    if patients < parts:
        raise ValueError(
            f"{counted(patients, 'patient')} for {parts} parts: expected at least as many, or smaller folds and validation"
        )
    kept = kinds[chosen]
    count = Counter(kept.tolist())
    # A stratum that is too rare for every part joins the most frequent one: there is nothing to keep in proportion.
    frequent = max(count, key=lambda kind: (count[kind], -kind))
    kept = np.array([kind if count[kind] >= parts else frequent for kind in kept.tolist()])
    with warnings.catch_warnings():
        # One patient may hold most slides of a stratum.
        warnings.simplefilter("ignore", UserWarning)
        folder = StratifiedGroupKFold(parts, shuffle=True, random_state=seed)
        found = [chosen[test] for _, test in folder.split(chosen, kept, groups[chosen])]
    if any(len(part) == 0 for part in found):
        raise ValueError(f"{patients} patients give an empty part of {parts}: expected more patients, or fewer folds")
    return found


def rare_targets(task: str, cohort: Cohort, splits: Sequence[Split]) -> list[str]:
    """A sentence for each class, label or event whose patients are fewer than the folds."""
    if task == "classification":
        targets = [(f"class {name!r}", cohort.values[:, 0] == number) for number, name in enumerate(cohort.classes)]
    elif task == "multi-label":
        pairs = [(number, name, value) for number, name in enumerate(cohort.columns) for value in (0, 1)]
        targets = [(f"{name}={value}", cohort.values[:, number] == value) for number, name, value in pairs]
    elif task == "survival":
        targets = [("the event", cohort.values[:, 1] == 1)]
    else:
        return []
    notes = []
    for name, has in targets:
        patients = len({patient for patient, own in zip(cohort.patients, has, strict=True) if own})
        if patients < len(splits):
            untrained, untested = (
                sum(not has[list(part)].any() for part in parts)
                for parts in ([split.train for split in splits], [split.test for split in splits])
            )
            notes.append(
                f"{name} has {counted(patients, 'patient')}, fewer than {len(splits)} folds: "
                f"{untrained} of the folds do not train on it, {untested} do not test it"
            )
    return notes


def write_splits(path: Path, cohort: Cohort, splits: Sequence[Split]) -> None:
    """A CSV with a row for each slide and a column for each fold, which says train, validation or test."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["slide", "patient", *(f"fold_{fold}" for fold in range(len(splits)))])
    for number, (slide, patient) in enumerate(zip(cohort.slides, cohort.patients, strict=True)):
        parts = [next(name for name in PARTS if number in getattr(split, name)) for split in splits]
        writer.writerow([slide, patient, *parts])
    write_text(path, text.getvalue())


def read_splits(path: Path, cohort: Cohort) -> list[Split]:
    """The inverse of :func:`write_splits`.

    Raises:
        ValueError: other slides or patients than the cohort's, or a patient in two parts of a fold.
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if [(row.get("slide"), row.get("patient")) for row in rows] != list(
        zip(cohort.slides, cohort.patients, strict=True)
    ):
        raise ValueError(f"{path} holds other slides or patients than the table: expected another --out")
    splits = []
    for name in (name for name in rows[0] if name.startswith("fold_")):
        parts = [tuple(n for n, row in enumerate(rows) if row[name] == part) for part in PARTS]
        holders = [{cohort.patients[n] for n in part} for part in parts]
        if sum(map(len, parts)) != len(rows) or len(set().union(*holders)) != sum(map(len, holders)):
            raise ValueError(
                f"{path}, column {name!r}: expected train, validation or test, and no patient in two of them"
            )
        splits.append(Split(*parts))
    return splits
