"""The slides of a cohort as tensors, read from their files when they are asked for; read-outs of a frozen encoder."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from longnet.gigapath.heads import SlideHead
from longnet.slides.files import is_made_from, read_slide, result_bytes
from longnet.slides.finetune.models import encode_frozen
from longnet.slides.finetune.settings import FinetuneSettings
from longnet.slides.finetune.table import Cohort
from longnet.slides.finetune.workers import Workers
from longnet.slides.folders import counted
from longnet.training.device import autocast
from longnet.training.files import write_bytes
from longnet.training.progress import Reporter, task

# Cells along a side, as SlideEncoder's default.
GRID = 1000
# Slides that an error names.
_NAMED = 3


Versions = dict[str, dict[str, str]]
"""By the name of a slide: bytes and modified, as :func:`version_of` gives, and sha256."""


def version_of(path: Path) -> dict[str, str]:
    """Size and modification time of a file, which tell whether it has changed."""
    state = path.stat()
    return {"bytes": str(state.st_size), "modified": str(state.st_mtime_ns)}


def digest(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changed_slides(cohort: Cohort, before: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Paths of the slides whose content is not what ``before`` says. Only files of another date or size are read."""
    return [
        str(path)
        for name, path in zip(cohort.slides, cohort.paths, strict=True)
        if not version_of(path).items() <= (was := before.get(name, {})).items() and digest(path) != was.get("sha256")
    ]


def check_slides(cohort: Cohort, settings: FinetuneSettings, workers: Workers, reporter: Reporter) -> Versions:
    """Read each slide once, all processes together; their versions.

    Raises:
        ValueError: slides that cannot be used, the first few by name: what :func:`read_cells` refuses, or channels that most
            slides have not.
    """
    found: dict[int, tuple[str, int, dict[str, str]]] = {}
    share = workers.share(range(len(cohort.paths)))
    with task(reporter, f"Checking {counted(len(cohort.paths), 'slide')}"):
        for done, (number, own) in enumerate(share, 1):
            if own:
                found[number] = _check(cohort.paths[number], settings)
            reporter.advance(done / len(share), cohort.slides[number])
    checked = list(workers.merge(found).values())
    widths = Counter(width for fault, width, _ in checked if not fault)
    channels, most = max(widths.items(), key=lambda item: item[1], default=(0, 0))
    faults = [
        fault or f"{path} has tiles of {width} channels: expected {channels}, as {most} of {len(checked)} slides have"
        for path, (fault, width, _) in zip(cohort.paths, checked, strict=True)
        if fault or width != channels
    ]
    if faults:
        first, more = "; ".join(faults[:_NAMED]), f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise ValueError(f"{len(faults)} of {counted(len(checked), 'slide')} cannot be used: {first}{more}")
    return {name: version for name, (_, _, version) in zip(cohort.slides, checked, strict=True)}


def _check(path: Path, settings: FinetuneSettings) -> tuple[str, int, dict[str, str]]:
    """(why a slide cannot be used or nothing, its channels, its version)."""
    try:
        version = version_of(path)
        embeddings, _ = read_cells(path, settings)
        return "", embeddings.shape[1], version | {"sha256": digest(path)}
    except (OSError, ValueError) as error:
        text = str(error)
        return text if text.startswith(str(path)) else f"{path}: {text}", 0, {}


def read_cells(path: Path, settings: FinetuneSettings) -> tuple[Tensor, Tensor]:
    """Embeddings (L, C) float32 of a slide's tiles and their cells (L, 2) float32: the column and the row of each.

    Raises:
        ValueError: a tile outside of the grid, or what :func:`read_slide` refuses. OSError: a file that cannot be read.
    """
    slide = read_slide(path, unit=settings.unit, mpp=settings.mpp)
    # Slides of one folder may differ in their tile size: the encoder sees cells.
    side = settings.tile_size or slide.tile_size or 256
    cells = (slide.coords / side).floor()
    inside = ((cells >= 0) & (cells < GRID)).all(1)
    if not bool(inside.all()):
        row = int((~inside).nonzero()[0])
        raise ValueError(
            f"{path}: tile {row} is at {slide.coords[row].tolist()}, outside of the grid: expected x and y from 0 to below "
            f"{GRID * side} pixels ({GRID} cells of {side})"
        )
    return slide.embeddings, cells


class Tiles:
    """Tile embeddings and places by the number of a slide.

    Attributes:
        in_dim: channels of a tile, the same in all slides.
    """

    def __init__(self, paths: Sequence[Path], settings: FinetuneSettings, device: torch.device) -> None:
        self._paths, self._settings, self._device = paths, settings, device
        self.in_dim = read_cells(paths[0], settings)[0].shape[1]

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """x (1, L, in_dim) float32 and coords (1, L, 2) in pixels of the encoder's tile size.

        Raises:
            ValueError: other channels than the first slide's; what :func:`read_cells` refuses.
        """
        embeddings, cells = read_cells(self._paths[number], self._settings)
        if (channels := embeddings.shape[1]) != self.in_dim:
            raise ValueError(
                f"{self._paths[number]} has tiles of {channels} channels: expected {self.in_dim} as in {self._paths[0].name}"
            )
        side = self._settings.tile_size or 256
        return embeddings[None].to(self._device), (cells * side)[None].to(self._device)


class ReadOuts:
    """What a frozen encoder reads out of each slide, in place of its tiles.

    Attributes:
        in_dim: channels of the read-outs together.
    """

    def __init__(self, values: Sequence[Tensor], device: torch.device) -> None:
        self._values = [value.to(device) for value in values]
        self._nowhere = torch.zeros(1, 1, 2, device=device)
        self.in_dim = values[0].shape[-1]

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """x (1, 1, in_dim) and coords of zeros."""
        return self._values[number][None, None], self._nowhere


def read_outs(
    head: SlideHead,
    tiles: Tiles,
    cohort: Cohort,
    settings: FinetuneSettings,
    made_from: dict[str, str],
    folder: Path,
    workers: Workers,
    reporter: Reporter,
) -> ReadOuts:
    """Encode each slide once, into ``folder``; files made from the same are kept.

    Args:
        head: with the frozen encoder, on its device.
        made_from: what the read-outs depend on besides the slide's file.
    """
    device = head.linear.weight.device
    targets = [folder / f"{name}.safetensors" for name in cohort.slides]
    about = [made_from | version_of(path) for path in cohort.paths]
    missing = workers.first_of([n for n, path in enumerate(targets) if not is_made_from(path, about[n])])
    folder.mkdir(parents=True, exist_ok=True)
    if missing:
        share = workers.share(missing)
        with task(reporter, f"Encoding {counted(len(missing), 'slide')}"):
            for done, (number, own) in enumerate(share, 1):
                with autocast(device, getattr(torch, settings.dtype)):
                    value = encode_frozen(head, *tiles[number])[0].float().cpu()
                if not bool(value.isfinite().all()):
                    raise ValueError(
                        f"{cohort.paths[number]}: its read-out is not finite: expected other weights or --dtype"
                    )
                if own:
                    write_bytes(targets[number], result_bytes({"read_out": value}, about[number]))
                reporter.advance(done / len(share), cohort.slides[number])
    # All files are there once every process has come here.
    workers.any_of(False)
    return ReadOuts([load_file(path)["read_out"] for path in targets], device)
