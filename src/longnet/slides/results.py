"""Results of a slide: a safetensors file whose metadata say what it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


def result_bytes(tensors: Mapping[str, Tensor], made_from: Mapping[str, str]) -> bytes:
    """The content of the file."""
    return save({name: x.contiguous() for name, x in tensors.items()}, metadata=dict(made_from))


def is_made_from(path: Path, made_from: Mapping[str, str]) -> bool:
    """Whether ``path`` is a whole result whose metadata hold all of ``made_from``."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            return made_from.items() <= (file.metadata() or {}).items()
    except SafetensorError:
        return False
