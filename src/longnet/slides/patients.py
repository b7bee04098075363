"""Several slides of a patient as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from longnet.slides.files import Slide
from longnet.slides.rows import read_rows

COLUMNS = ("PATIENT", "FILENAME")


def join_slides(slides: Sequence[Slide], tile_size: int, names: Sequence[str] = ()) -> Slide:
    """Slides one beside another along x, each starting a tile after the last tile of the one before, as STAMP places them.

    Args:
        slides: in their order, of one number of channels.
        tile_size: side of a tile in pixels of the coordinates, of all slides.
        names: of the slides' files, for errors.

    Raises:
        ValueError: no slide, other channels, or slides that say another tile size or other microns of a pixel.
    """
    if not slides:
        raise ValueError("slides is empty: expected at least one")
    names = names or [f"slides[{number}]" for number in range(len(slides))]
    channels = slides[0].embeddings.shape[1]
    scaled = next((number for number, slide in enumerate(slides) if slide.mpp is not None), 0)
    mpp = slides[scaled].mpp
    for name, slide in zip(names, slides, strict=True):
        if slide.embeddings.shape[1] != channels:
            raise ValueError(f"{name} has {slide.embeddings.shape[1]} channels: expected {channels}, as {names[0]}")
        if slide.tile_size not in (None, tile_size):
            raise ValueError(
                f"{name} has tiles of {slide.tile_size} pixels: expected {tile_size} in all slides of a patient "
                f"({names[0]} says {slides[0].tile_size or 'none'})"
            )
        if slide.mpp is not None and mpp is not None and not math.isclose(slide.mpp, mpp, rel_tol=1e-3):
            raise ValueError(
                f"{name} has {slide.mpp:.4g} microns a pixel and {names[scaled]} {mpp:.4g}: expected the same in all slides "
                "of a patient"
            )
    moved, offset = [], 0.0
    for slide in slides:
        moved.append(slide.coords + torch.tensor([offset, 0.0]))
        offset += float(slide.coords[:, 0].max()) + tile_size
    embeddings = torch.cat([slide.embeddings for slide in slides])
    return Slide(embeddings, torch.cat(moved), tile_size, slides[0].tile_size_from, mpp)


def read_patients(table: Path, folder: Path) -> dict[str, tuple[Path, ...]]:
    """The slides of each patient, from a CSV of the columns PATIENT and FILENAME, paths in ``folder``, as STAMP's slide table.

    Raises:
        ValueError: other columns, an empty cell, no row, a slide that is there twice, or a patient whose name is no name of a
            file. OSError: no such table.
    """
    return {patient: tuple(row.path for row in rows) for patient, rows in patient_rows(table, folder).items()}


class Row(NamedTuple):
    """A slide of a patient and the table's line that names it."""

    path: Path
    line: int


def patient_rows(table: Path, folder: Path) -> dict[str, list[Row]]:
    """As :func:`read_patients`, with the line of each slide."""
    header, rows = read_rows(table)
    if not set(COLUMNS) <= set(header):
        raise ValueError(f"{table} has the columns {header}: expected {COLUMNS}")
    slides: dict[str, list[Row]] = {}
    lines: dict[Path, int] = {}
    for line, row in rows:
        patient, name = (row[column] for column in COLUMNS)
        at = f"{table}, line {line}"
        for column in COLUMNS:
            if row[column].lower() in ("", "nan"):
                raise ValueError(f"{at}, column {column!r} is {row[column]!r}: expected a name")
        if Path(patient).name != patient or "\\" in patient:
            raise ValueError(
                f"{at}: the patient is {patient!r}: expected a name without a slash, as files are named by it"
            )
        path = folder / name
        if (first := lines.setdefault(path.resolve(), line)) != line:
            raise ValueError(f"{at}: {name!r} is on line {first} already: expected each slide once")
        slides.setdefault(patient, []).append(Row(path, line))
    return slides
