"""The slides of a cohort as tensors, read from their files when they are asked for; read-outs of a frozen encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
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


class Tiles:
    """Tile embeddings and places by the number of a slide.

    Attributes:
        in_dim: channels of a tile, the same in all slides.
    """

    def __init__(self, paths: Sequence[Path], settings: FinetuneSettings, device: torch.device) -> None:
        self._paths, self._device = paths, device
        self._side, self._given = settings.tile_size or 256, settings.tile_size
        self._read = partial(read_slide, unit=settings.unit, mpp=settings.mpp)
        self.in_dim = self._read(paths[0]).embeddings.shape[1]

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """x (1, L, in_dim) float32 and coords (1, L, 2) in pixels of the encoder's tile size.

        Raises:
            ValueError: no tile, other channels than the first slide's, a tile outside of the grid; what :func:`read_slide`
                refuses.
        """
        path = self._paths[number]
        slide = self._read(path)
        count, channels = slide.embeddings.shape
        if count == 0 or channels != self.in_dim:
            raise ValueError(
                f"{path} has {counted(count, 'tile')} of {channels} channels: expected at least one, of {self.in_dim} as in "
                f"{self._paths[0].name}"
            )
        # Slides of one folder may differ in their tile size: the encoder sees cells.
        side = self._given or slide.tile_size or self._side
        cells = (slide.coords / side).floor()
        inside = ((cells >= 0) & (cells < GRID)).all(1)
        if not bool(inside.all()):
            row = int((~inside).nonzero()[0])
            raise ValueError(
                f"{path}: tile {row} is at {slide.coords[row].tolist()}, outside of the grid: expected x and y from 0 to below "
                f"{GRID * side} pixels ({GRID} cells of {side})"
            )
        return slide.embeddings[None].to(self._device), (cells * self._side)[None].to(self._device)


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
    states = [path.stat() for path in cohort.paths]
    about = [made_from | {"bytes": str(one.st_size), "modified": str(one.st_mtime_ns)} for one in states]
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
