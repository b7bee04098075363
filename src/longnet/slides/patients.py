"""Several slides of a patient as one."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from longnet.slides.files import Slide

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
