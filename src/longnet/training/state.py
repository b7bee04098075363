"""The state of a run between two steps as named tensors: collected from model, optimizer and generators, and restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from longnet.training.checkpoint import Checkpoint, CheckpointError, check_tensors, collect_weights, restore_weights
from longnet.training.optimizer import state_shapes
from longnet.training.ranks import spread_like, whole


def collect_state(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, Tensor]:
    """All tensors that a resumed run needs, by the names of ``longnet.training.checkpoint``.

    Tensors are whole. If they are sharded over processes, all processes must call.
    """
    tensors = {f"model.{name}": whole(tensor) for name, tensor in collect_weights(model).items()}
    for name, weight in model.named_parameters():
        for key, value in optimizer.state[weight].items():
            tensors[f"optimizer.{name}.{key}"] = whole(value)
    tensors["rng.cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def restore_state(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> None:
    """The inverse of ``collect_state``. Everything is checked before anything is changed.

    A run that moves between the CPU and CUDA starts the generators of its new device from the seed.

    Raises:
        CheckpointError: names, shapes or dtypes that do not fit.
    """
    weights = model_weights(checkpoint.tensors)
    moments = _with_prefix(checkpoint.tensors, "optimizer.")
    check_tensors(collect_weights(model), weights, checkpoint.path)
    states: dict[Tensor, dict[str, Any]] = {}
    shapes = state_shapes(optimizer)
    # The optimizer has no state before its first step.
    for name, weight in model.named_parameters() if moments else ():
        states[weight] = {}
        for key, shape in shapes[weight].items():
            value = moments.get(f"{name}.{key}")
            if value is None or value.shape != shape:
                raise CheckpointError(
                    f"{checkpoint.path} does not fit the optimizer: {name}.{key} is "
                    f"{'missing' if value is None else tuple(value.shape)}, expected {tuple(shape)}"
                )
            states[weight][key] = value.to(device) if key == "step" else spread_like(weight, value)
    restore_weights(model, weights, checkpoint.path)
    optimizer.state.update(states)
    generators = _with_prefix(checkpoint.tensors, "rng.")
    if "cpu" not in generators:
        raise CheckpointError(f"{checkpoint.path} is damaged: it lacks rng.cpu")
    torch.set_rng_state(generators["cpu"])
    if device.type == "cuda" and "cuda" in generators:
        torch.cuda.set_rng_state(generators["cuda"], device)


def model_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's weights among the tensors of a state, by the names of ``collect_weights``."""
    return _with_prefix(tensors, "model.")


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
