"""Which layers of a dense model stay full when the others become windows.

Layers become windows one after another: of those that are left, the one whose window raises the bits of training text least.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import results
from benchmarks.learning.probes import bits_of
from longnet import LongNetConfig, LongNetLM
from longnet.training import load_model

WINDOW = 512


def with_full(config: LongNetConfig, places: Sequence[int]) -> LongNetConfig:
    """The model with full attention at ``places`` alone, and windows elsewhere."""
    types = tuple("full_attention" if at in places else "sliding_attention" for at in range(config.layers))
    return replace(config, layer_types=types, sliding_window=WINDOW)


def order(layers: int, bits: Callable[[Sequence[int]], float]) -> list[dict[str, Any]]:
    """What became a window, first to last, and the bits after it; ``bits`` takes the places that stay full."""
    full, found = list(range(layers)), []
    while len(full) > 1:
        scored = {place: bits([one for one in full if one != place]) for place in full}
        place = min(scored, key=scored.__getitem__)
        full.remove(place)
        found.append({"window": place, "full": list(full), "bits": scored[place]})
    return found


def order_of(run: Path, rows: np.ndarray, device: torch.device, batch: int) -> list[dict[str, Any]]:
    """That of a run's dense model on windows of text (windows, N + 1); kept beside the run.

    Raises:
        ValueError: a model that has other layers than full ones.
    """
    file = run.parent / f"{run.name}.order.json"
    if file.exists():
        return list(json.loads(file.read_text())["order"])
    dense = load_model(run, device)
    if dense.config.layer_types is None or {*dense.config.layer_types} != {"full_attention"}:
        raise ValueError(f"--keep: {run} has layers of {dense.config.layer_types}. Expected full_attention alone")
    weights = dense.state_dict()

    def bits(places: Sequence[int]) -> float:
        model = LongNetLM(with_full(dense.config, places), device=device).eval()
        model.load_state_dict(weights)
        return float(bits_of(model, rows, device, batch).mean())

    found = order(dense.config.layers, bits)
    results.save({"windows": len(rows), "window": WINDOW, "order": found}, file)
    return found
