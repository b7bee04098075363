"""Small cohorts and settings for the tests of fine-tuning."""

from __future__ import annotations

import csv
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longnet.slides.finetune import FinetuneSettings
from longnet.slides.finetune.data import Tiles
from longnet.slides.finetune.fit import Fit, seed_of
from longnet.slides.finetune.models import make_model
from longnet.slides.finetune.splits import make_splits
from longnet.slides.finetune.table import read_cohort
from longnet.slides.finetune.tasks import FoldTask
from longnet.slides.finetune.workers import Workers

EXAMPLE = Path(__file__).parents[2] / "examples" / "make_cohort.py"


def example() -> ModuleType:
    """The script that makes a cohort, as a module."""
    spec = importlib.util.spec_from_file_location("make_cohort", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_cohort(folder: Path, *options: object) -> Path:
    """A cohort of the script in ``folder``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_cohort.py", str(folder), *map(str, options)])
        example().main()
    return folder


def settings_of(cohort: Path, out: Path, **changes: Any) -> FinetuneSettings:
    """A small encoder that learns fast."""
    values: dict[str, Any] = {
        "table": str(cohort / "table.csv"), "features": str(cohort / "features"), "out": str(out), "task": "classification",
        "dim": 32, "depth": 1, "lr": 5e-3, "layer_decay": 1.0, "dropout": 0.0, "drop_path": 0.0, "accumulate": 4,
        "epochs": 3, "folds": 2, "validation": 0.25, "device": "cpu", "baselines": False,
    }  # fmt: skip
    return FinetuneSettings(**values | changes)


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


class Float64:
    """Slides in float64, where AdamW's quotients of small gradients do not amplify rounding."""

    def __init__(self, tiles: Tiles) -> None:
        self._tiles, self.in_dim = tiles, tiles.in_dim

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        x, coords = self._tiles[number]
        return x.double(), coords


def fit_of(
    settings: FinetuneSettings,
    name: str = "encoder",
    workers: Workers | None = None,
    state: str = "state",
    dtype: torch.dtype = torch.float32,
) -> tuple[Fit, nn.Module]:
    """The training of a model on fold 0, and the model."""
    cohort = read_cohort(settings)
    split = make_splits(cohort, settings)[0]
    task, tiles = FoldTask(settings, cohort, split.train), Tiles(cohort.paths, settings, torch.device("cpu"))
    torch.manual_seed(seed_of(settings.seed, 0, name))
    model = make_model(name, settings, tiles.in_dim, task.outputs).to(dtype)
    slides = tiles if dtype == torch.float32 else Float64(tiles)
    return Fit(name, model, slides, task, split, 0, settings, Path(settings.out) / state, workers), model
