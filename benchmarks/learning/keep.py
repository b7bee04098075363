"""Which layers of a dense run stay full when the others get windows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks import results
from benchmarks.learning.probes import bits_of
from longnet import LongNetConfig, LongNetLM
from longnet.models.window_layers import window_layers
from longnet.training import load_model

WINDOW = 512


def converted_models(run: Path, rows: np.ndarray, device: torch.device, batch: int) -> dict[int, LongNetConfig]:
    """The run's model with each number of full layers, chosen on text (windows, N + 1); the choice is stored beside the run.

    Raises:
        ValueError: a model that has other layers than full ones.
    """
    dense = load_model(run, device)
    config, weights = dense.config, dense.state_dict()
    if config.layer_types is None or {*config.layer_types} != {"full_attention"}:
        raise ValueError(f"--keep: {run} has layers of {config.layer_types}. Expected full_attention alone")
    types = ("full_attention",) * config.layers

    def bits(layer_types: tuple[str, ...]) -> float:
        model = LongNetLM(replace(config, layer_types=layer_types, sliding_window=WINDOW), device=device).eval()
        model.load_state_dict(weights)
        return float(bits_of(model, rows, device, batch).mean())

    file = run.parent / f"{run.name}.order.json"
    if not file.exists():
        steps = [
            {"window": step.layer, "full": step.full_layers, "bits": step.loss} for step in window_layers(types, bits)
        ]
        results.save({"windows": len(rows), "window": WINDOW, "dense": bits(types), "order": steps}, file)
    chosen = [step["full"] for step in json.loads(file.read_text())["order"]]
    return {
        len(full): replace(
            config,
            layer_types=tuple("full_attention" if at in full else "sliding_attention" for at in range(config.layers)),
            sliding_window=WINDOW,
        )
        for full in chosen
    }
