"""Where a module computes and in which dtype: quantised and offloaded weights do not say it."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn


def is_dispatched(module: nn.Module) -> bool:
    """Whether accelerate (``device_map``) moves the module's inputs, and its weights if they are elsewhere."""
    return hasattr(module, "_hf_hook")


def device_of(module: nn.Module) -> torch.device:
    """Where the module computes: what accelerate was told, else where its parameters and buffers are, else the CPU."""
    declared = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if declared is not None:
        return torch.device(declared)
    return next((x.device for x in chain(module.parameters(), module.buffers())), torch.device("cpu"))


def dtype_of(embedding: nn.Module, model: nn.Module) -> torch.dtype:
    """The dtype of the residual stream: the embedding table's, else (it is quantised) that of the first float parameter."""
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight.dtype
    return next((x.dtype for x in model.parameters() if x.is_floating_point()), torch.get_default_dtype())
