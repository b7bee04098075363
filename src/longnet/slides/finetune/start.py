"""What is checked before a run is recorded, and the record by which a later call knows it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from longnet.gigapath.checkpoint import read_checkpoint
from longnet.gigapath.heads import SlideHead
from longnet.slides.finetune.data import Tiles, Versions, changed_slides, check_slides, digest
from longnet.slides.finetune.models import make_encoder
from longnet.slides.finetune.settings import FREE_TO_CHANGE, FinetuneSettings
from longnet.slides.finetune.splits import Split, make_splits, read_splits, write_splits
from longnet.slides.finetune.table import Cohort
from longnet.slides.finetune.tasks import FoldTask
from longnet.slides.finetune.workers import Workers
from longnet.slides.folders import counted, listed
from longnet.training.files import read_json, write_json
from longnet.training.progress import Reporter


def prepare(settings: FinetuneSettings, cohort: Cohort, workers: Workers, tell: Reporter) -> list[Split]:
    """The splits: those of the run in ``settings.out`` if it has one, else new ones.

    ``settings.json`` records settings, digests and the versions of the slides. It is written once all is checked, so a call that
    is refused leaves the folder free for the next.

    Raises:
        ValueError: a run of other settings, table, checkpoint or slides; a folder of other files; slides that cannot be used;
            an encoder that cannot be made. Every process raises what the first does.
    """
    out = Path(settings.out)
    file, parts = out / "settings.json", out / "splits.csv"
    resumes = workers.first_of(file.exists())
    if resumes:
        splits = workers.on_first(lambda: _continue(file, parts, settings, cohort))
        tell.say(f"Continuing the run in {out}")
    else:
        splits = workers.on_first(lambda: _new_splits(settings, cohort))
    slides: Versions = {} if resumes else check_slides(cohort, settings, workers, tell)

    def finish() -> None:
        _check_encoder(settings, cohort, tell)
        if not resumes:
            write_splits(parts, cohort, splits)
            write_json(file, _record(settings) | {"slides": slides})

    workers.on_first(finish)
    return splits


def _new_splits(settings: FinetuneSettings, cohort: Cohort) -> list[Split]:
    if any(one.name != ".lock" for one in Path(settings.out).iterdir()):
        raise ValueError(f"out={settings.out!r} holds other files: expected a new or empty folder, or a run's own")
    splits = make_splits(cohort, settings)
    for split in splits:
        FoldTask(settings, cohort, split.train)
    return splits


def _record(settings: FinetuneSettings) -> dict[str, Any]:
    checkpoint = None if settings.checkpoint is None else digest(Path(settings.checkpoint))
    return settings.to_dict() | {"table_digest": digest(Path(settings.table)), "checkpoint_digest": checkpoint}


def _continue(file: Path, parts: Path, settings: FinetuneSettings, cohort: Cohort) -> list[Split]:
    before = read_json(file)
    changed = [
        f"the {name.removesuffix('_digest')}'s contents changed"
        if name.endswith("_digest")
        else f"{name} was {before.get(name)!r}, now {value!r}"
        for name, value in _record(settings).items()
        if name not in FREE_TO_CHANGE and before.get(name) != value
    ]
    # With another table the slides are others too: the table says it.
    if not changed and (others := changed_slides(cohort, before.get("slides") or {})):
        changed = [f"{len(others)} of {counted(len(cohort.slides), 'slide')} changed, {listed(others, 3)}"]
    if changed:
        raise ValueError(
            f"{file} is of another run: {'; '.join(changed)}. Expected the same settings and files, or another --out"
        )
    return read_splits(parts, cohort)


def _check_encoder(settings: FinetuneSettings, cohort: Cohort, tell: Reporter) -> None:
    """Makes the encoder with its head once, and says what its checkpoint held besides."""
    if settings.checkpoint is not None:
        for note in read_checkpoint(settings.checkpoint).notes:
            tell.say(f"{Path(settings.checkpoint).name}: {note}")
    tiles = Tiles(cohort.paths[:1], settings, torch.device("cpu"))
    SlideHead(make_encoder(settings, tiles.in_dim), 1, layers=settings.layers)
