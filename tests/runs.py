"""A run folder as ``longnet train`` leaves it, without the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from longnet.models import LongNetConfig, LongNetLM
from longnet.training.files import write_json
from longnet.training.folder import RunFolder

SMALL = {"dim": 16, "heads": 2, "layers": 2, "segment_lengths": [8, 16], "dilation_rates": [1, 2], "dropout": 0.1}


def make_run(path: Path, seed: int = 0, **changes: Any) -> Path:
    """Write the model and its config into a new folder."""
    config = LongNetConfig.from_dict({**SMALL, **changes})
    path.mkdir(parents=True)
    write_json(path / "config.json", config.to_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        RunFolder(path).write_model(LongNetLM(config))
    return path
