"""Reading a slide encoder's checkpoint, without running what a pickle may hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def read_weights(source: str | Path | Mapping[str, object]) -> Mapping[str, Tensor]:
    """Tensors by name, from a ``.safetensors``, any other file that ``torch.load`` reads, or a state dict.

    Where there is a ``"model"`` that holds tensors, these are taken.

    Raises:
        TypeError: something else. ValueError: a file that is neither. OSError: a file that cannot be read.
    """
    weights: Any = load_tensors(Path(source)) if isinstance(source, str | Path) else source
    if isinstance(weights, Mapping) and isinstance(weights.get("model"), Mapping):
        weights = weights["model"]
    if not isinstance(weights, Mapping):
        raise TypeError(f"{source!r} holds a {type(weights).__name__}: expected tensors by name, or a file of them")
    return weights


def load_tensors(path: Path) -> Any:
    """What a ``.safetensors`` holds, or any other file for ``torch.load(weights_only=True)``, on the CPU.

    Raises:
        ValueError: a file that is neither. OSError: a file that cannot be read.
    """
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        # What they raise for bytes that are something else is of any type.
        raise ValueError(f"{path} holds no tensors alone: {type(error).__name__}: {error}") from None
