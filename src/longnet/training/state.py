"""The state of a run between two steps as named tensors: collected from model, optimizer and generators, and restored."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longnet.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_tensors,
    collect_weights,
    model_weights,
    restore_weights,
)
from longnet.training.optimizer import state_shapes
from longnet.training.ranks import whole


def collect_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, *, sharded: bool = False
) -> dict[str, Tensor]:
    """All tensors that a resumed run needs, by the names of ``longnet.training.checkpoint``.

    Tensors are whole, unless they may stay ``sharded``. If they are sharded over processes, all processes must call.
    """
    tensors = {f"model.{name}": tensor for name, tensor in collect_weights(model).items()}
    for name, weight in model.named_parameters():
        for key, value in optimizer.state[weight].items():
            tensors[f"optimizer.{name}.{key}"] = value
    if not sharded:
        tensors = {name: whole(tensor) for name, tensor in tensors.items()}
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
    saved, path = checkpoint.tensors, checkpoint.path
    weights = collect_weights(model)
    check_tensors(weights, model_weights(saved), path)
    like: dict[str, Tensor] = {f"model.{name}": weight for name, weight in weights.items()}
    states: dict[Tensor, dict[str, str]] = {}
    shapes = state_shapes(optimizer)
    # The optimizer has no state before its first step.
    has_stepped = any(name.startswith("optimizer.") for name in saved)
    for name, weight in model.named_parameters() if has_stepped else ():
        if weight not in shapes:  # It is not trained.
            continue
        states[weight] = {key: f"optimizer.{name}.{key}" for key in shapes[weight]}
        for key, shape in shapes[weight].items():
            value = saved.get(states[weight][key])
            if value is None or value.shape != shape:
                raise CheckpointError(
                    f"{path} does not fit the optimizer: {name}.{key} is "
                    f"{'missing' if value is None else tuple(value.shape)}, expected {tuple(shape)}"
                )
            like[states[weight][key]] = torch.empty((), device=device) if key == "step" else weight
    if "rng.cpu" not in saved:
        raise CheckpointError(f"{path} is damaged: it lacks rng.cpu")
    generators = [name for name in ("rng.cpu", "rng.cuda") if name in saved]
    like |= {name: torch.empty_like(saved[name], device="cpu") for name in generators}
    placed = checkpoint.place(like)
    restore_weights(model, model_weights(placed), path)
    for parameter, state in states.items():
        optimizer.state[parameter] = {key: placed[name] for key, name in state.items()}
    torch.set_rng_state(placed["rng.cpu"])
    if device.type == "cuda" and "rng.cuda" in placed:
        torch.cuda.set_rng_state(placed["rng.cuda"], device)
