"""Several slides of a patient as one."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch

from longnet.slides.files import Slide

COLUMNS = ("PATIENT", "FILENAME")


def join_slides(slides: Sequence[Slide], tile_size: int) -> Slide:
    """Slides one beside another along x, each starting a tile after the last tile of the one before, as STAMP places them.

    Args:
        slides: in their order, of one number of channels.
        tile_size: side of a tile in pixels of the coordinates, of all slides.

    Raises:
        ValueError: no slide, other channels, or slides that say another tile size.
    """
    if not slides:
        raise ValueError("slides is empty: expected at least one")
    for number, slide in enumerate(slides):
        if slide.tile_size not in (None, tile_size) or slide.embeddings.shape[1] != slides[0].embeddings.shape[1]:
            raise ValueError(
                f"slides[{number}] has {slide.embeddings.shape[1]} channels and tiles of {slide.tile_size} pixels: expected "
                f"{slides[0].embeddings.shape[1]} and {tile_size}, those of slides[0]"
            )
    moved, offset = [], 0.0
    for slide in slides:
        moved.append(slide.coords + torch.tensor([offset, 0.0]))
        offset += float(slide.coords[:, 0].max()) + tile_size
    return Slide(
        torch.cat([slide.embeddings for slide in slides]), torch.cat(moved), tile_size, slides[0].tile_size_from
    )


def read_patients(table: Path, folder: Path) -> dict[str, tuple[Path, ...]]:
    """The slides of each patient, from a CSV of the columns PATIENT and FILENAME, paths in ``folder``, as STAMP's slide table.

    Raises:
        ValueError: other columns, an empty cell, no row, or a patient whose name is no name of a file. OSError: no such table.
    """
    slides: dict[str, list[Path]] = {}
    with table.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        if not set(COLUMNS) <= set(rows.fieldnames or ()):
            raise ValueError(f"{table} has the columns {rows.fieldnames}: expected {COLUMNS}")
        for row in rows:
            patient, name = (row[column] for column in COLUMNS)
            if not patient or not name or Path(patient).name != patient:
                raise ValueError(f"{table}, line {rows.line_num}: {patient!r}, {name!r}: expected a name and a file")
            slides.setdefault(patient, []).append(folder / name)
    if not slides:
        raise ValueError(f"{table} has no row: expected a row for each slide")
    return {patient: tuple(paths) for patient, paths in slides.items()}
