"""A small text and a small model: a step takes milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longnet.models import LongNetConfig
from longnet.training import TrainSettings

SMALL_MODEL = {
    "dim": 16,
    "heads": 2,
    "layers": 1,
    "segment_lengths": [8, 16],
    "dilation_rates": [1, 2],
    "dropout": 0.1,
}


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """Forty small files in two folders, with hidden and empty ones that are not to be read."""
    root = tmp_path / "text"
    for number in range(40):
        file = root / ("a" if number % 2 else "b") / f"{number:02d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"line {line} of file {number}: {line * number}\n" for line in range(20)))
    (root / ".hidden").write_text("not read")
    (root / "empty.txt").touch()
    return root


@pytest.fixture
def make_settings(tmp_path: Path, text_folder: Path) -> Callable[..., TrainSettings]:
    """Settings of a run of 12 steps into a fresh folder, with changes."""

    def make(**changes: Any) -> TrainSettings:
        values: dict[str, Any] = {
            "out": str(tmp_path / "run"),
            "data": str(text_folder),
            "model": LongNetConfig.from_dict(SMALL_MODEL),
            "context": 32,
            "steps": 12,
            "batch": 2,
            "warmup": 3,
            "eval_every": 4,
            "eval_windows": 2,
            "save_every": 5,
            "threads": 1,
            "device": "cpu",
        }
        return TrainSettings(**{**values, **changes})

    return make
