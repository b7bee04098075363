"""The table of a cohort: a CSV file with a row for each slide. Errors name the line and the column."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longnet.slides.files import SLIDE_FORMATS
from longnet.slides.finetune.settings import FinetuneSettings
from longnet.slides.folders import counted, files_below, is_hidden
from longnet.slides.rows import read_rows


@dataclass(frozen=True)
class Cohort:
    """The slides of a table, in its order.

    Attributes:
        slides: names, each once.
        patients: the patient of each slide; the slide's own name where the table has no patients.
        paths: the file of each slide.
        columns: names of the targets.
        values: (slides, columns) float64: the number of the class, 0 or 1 for each label, numbers, or time and event.
        classes: names of the classes, sorted; empty for other tasks.
        has_patients: whether the table says who the patients are.
        hidden: files of the folder that were passed over, as their names begin with a dot.
    """

    slides: tuple[str, ...]
    patients: tuple[str, ...]
    paths: tuple[Path, ...]
    columns: tuple[str, ...]
    values: np.ndarray
    classes: tuple[str, ...]
    has_patients: bool
    hidden: tuple[str, ...] = ()


def read_cohort(settings: FinetuneSettings) -> Cohort:
    """Read the table and find the file of each slide.

    Raises:
        ValueError: a column that is missing, a cell that does not fit the task, a slide that is there twice or has no file.
        OSError: the table or the folder cannot be read.
    """
    path = Path(settings.table)
    if not path.is_file():
        raise FileNotFoundError(
            f"table={settings.table!r} is not a file: expected a CSV file with a row for each slide"
        )
    _check_commas(path)
    header, rows = read_rows(path)
    columns = _target_columns(settings, header, path)
    has_patients = settings.patient_column in header
    if not has_patients and settings.patient_column != "patient":
        raise ValueError(f"{path} has no column {settings.patient_column!r}: its columns are {header}")
    for name in (settings.slide_column, *columns):
        if name not in header:
            raise ValueError(f"{path} has no column {name!r}: its columns are {header}")
    files, hidden = _slide_files(Path(settings.features), Path(settings.out))
    lines: dict[str, int] = {}
    patients, cells = [], []
    for line, row in rows:
        at = f"{path}, line {line}"
        slide = _cell(row, settings.slide_column, at)
        if slide in lines:
            raise ValueError(f"{at}: slide {slide!r} is on line {lines[slide]} already: expected each slide once")
        lines[slide] = line
        patients.append(_cell(row, settings.patient_column, at) if has_patients else slide)
        cells.append([(_cell(row, name, at), f"{at}, column {name!r}") for name in columns])
    paths = _one_file_each(path, lines, files, settings.features)
    classes: tuple[str, ...] = ()
    if settings.task == "classification":
        classes = tuple(sorted({row[0][0] for row in cells}))
        if len(classes) < 2:
            raise ValueError(
                f"{path}, column {columns[0]!r}: every slide is {classes[0]!r}: expected two classes or more"
            )
        _check_classes(f"{path}, column {columns[0]!r}", classes, len(set(patients)))
        values = np.array([[float(classes.index(row[0][0]))] for row in cells])
    else:
        values = np.array([[_number(text, where) for text, where in row] for row in cells])
        for texts, numbers in zip(cells, values, strict=True):
            _check_numbers(settings.task, texts, numbers)
    if settings.task == "regression":
        for name, numbers in zip(columns, values.T, strict=True):
            if not np.ptp(numbers):
                raise ValueError(f"{path}, column {name!r}: every slide has {numbers[0]:g}: expected several values")
    if settings.task == "survival":
        _check_patients(path, patients, values, list(lines.values()))
        _check_events(path, settings, values)
    return Cohort(tuple(lines), tuple(patients), tuple(paths), columns, values, classes, has_patients, hidden)


def _target_columns(settings: FinetuneSettings, header: list[str], path: Path) -> tuple[str, ...]:
    if settings.task == "survival":
        return settings.time_column, settings.event_column
    if settings.label_columns is not None:
        columns = tuple(name.strip() for name in settings.label_columns.split(","))
    elif settings.task == "multi-label":
        columns = tuple(name for name in header if name.startswith("label_"))
        if not columns:
            raise ValueError(
                f"{path} has no column that begins with label_: name the labels by --label-columns; it has {header}"
            )
    else:
        columns = ("label",)
    if settings.task == "classification" and len(columns) != 1:
        raise ValueError(
            f"label_columns={columns} with task='classification': expected one column, or task='multi-label'"
        )
    if len(set(columns)) < len(columns):
        raise ValueError(f"label_columns={columns}: expected each column once")
    return columns


def _slide_files(folder: Path, out: Path) -> tuple[dict[str, list[Path]], tuple[str, ...]]:
    """(files by name without suffix, in the folder and its folders but not in ``out``; hidden ones)."""

    def refuse(error: OSError) -> None:
        raise error

    if not folder.is_dir():
        raise FileNotFoundError(f"features={str(folder)!r} is not a folder: expected one with the slides' files")
    files: dict[str, list[Path]] = {}
    hidden: list[str] = []
    results = out.resolve()
    for path in files_below(folder, refuse):
        if path.suffix.lower() not in SLIDE_FORMATS or results in (folder / path).resolve().parents:
            continue
        if is_hidden(path):
            hidden.append(str(path))
        elif (folder / path).is_file():
            files.setdefault(path.stem, []).append(folder / path)
    return files, tuple(hidden)


def _check_commas(path: Path) -> None:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        header = file.readline()
    for mark, name in ((";", "semicolons"), ("\t", "tabs")):
        if mark in header and "," not in header:
            raise ValueError(f"{path} has {name} between its columns: expected commas")


def _one_file_each(
    path: Path, lines: Mapping[str, int], files: Mapping[str, Sequence[Path]], folder: str
) -> list[Path]:
    """The file of each slide; those that have none or several are refused together."""
    faults = []
    for slide, line in lines.items():
        if len(found := files.get(slide, [])) == 1:
            continue
        name = Path(slide)
        if not found and name.suffix.lower() in SLIDE_FORMATS and name.stem in files:
            fault = f"is written with its suffix: expected the name without {name.suffix}"
        else:
            has = f"several files, {', '.join(map(str, found))}" if found else f"no file in {folder}"
            # CLAM writes pt_files and h5_files, whose tiles have coordinates, beside each other.
            parents = dict.fromkeys(str(one.parent) for one in found)
            which = f"; features may be {' or '.join(parents)} alone" if len(parents) > 1 else ""
            fault = f"has {has}: expected one of {SLIDE_FORMATS}{which}"
        faults.append(f"line {line}: slide {slide!r} {fault}")
    if faults:
        more = f" And {counted(len(faults) - 3, 'slide')} more." if len(faults) > 3 else ""
        count = f" ({len(faults)} of {counted(len(lines), 'slide')} cannot be found.{more})" if len(faults) > 1 else ""
        raise ValueError(f"{path}, {'; '.join(faults[:3])}{count}")
    return [files[slide][0] for slide in lines]


def _check_classes(where: str, classes: Sequence[str], patients: int) -> None:
    """Refuses numbers and names that are hardly those of classes."""
    try:
        numbers = [float(name) for name in classes]
    except ValueError:
        numbers = []
    if any(not number.is_integer() for number in numbers):
        raise ValueError(
            f"{where} holds numbers with a fractional part, as {classes[0]} and {classes[1]}: expected names of classes, or "
            "task='regression'"
        )
    if len(classes) > max(2, patients / 2):
        other = ", or task='regression'" if numbers else ""
        raise ValueError(
            f"{where} has {len(classes)} classes for {counted(patients, 'patient')}: expected at most half as many classes as "
            f"patients{other}"
        )


def _check_events(path: Path, settings: FinetuneSettings, values: np.ndarray) -> None:
    times = len(np.unique(values[values[:, 1] == 1, 0]))
    if not times:
        raise ValueError(f"{path}, column {settings.event_column!r}: no event happened: expected at least one")
    if times < settings.intervals:
        raise ValueError(
            f"intervals={settings.intervals}: events have {counted(times, 'different time')} in {path}, column "
            f"{settings.time_column!r}: expected at most as many intervals as times"
        )


def _cell(row: dict[str, str], column: str, at: str) -> str:
    text = row[column]
    if text.lower() in ("", "nan"):
        state = f"is {text!r}" if text else "is empty"
        raise ValueError(f"{at}, column {column!r} {state}: expected a value; leave out the slides that have none")
    return text


def _check_patients(path: Path, patients: list[str], values: np.ndarray, lines: list[int]) -> None:
    """Refuses a patient with two times or events."""
    first: dict[str, int] = {}
    for number, patient in enumerate(patients):
        other = first.setdefault(patient, number)
        if (values[number] != values[other]).any():
            (was, event), (time, ends) = values[other], values[number]
            raise ValueError(
                f"{path}, line {lines[number]}: patient {patient!r} has time {time:g} and event {ends:g}, on line "
                f"{lines[other]} time {was:g} and event {event:g}: expected the same on every line of a patient"
            )


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where} is {text!r}: expected a finite number")
    return value


def _check_numbers(task: str, row: list[tuple[str, str]], numbers: np.ndarray) -> None:
    for place, ((text, where), value) in enumerate(zip(row, numbers, strict=True)):
        flag = task == "multi-label" or (task == "survival" and place == 1)
        if flag and value not in (0.0, 1.0):
            raise ValueError(f"{where} is {text!r}: expected 0 or 1")
        if task == "survival" and place == 0 and value < 0:
            raise ValueError(f"{where} is {text!r}: expected a time of at least 0")
