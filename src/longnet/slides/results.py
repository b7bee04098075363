"""What was computed of a slide, as a safetensors file that says from what it was made."""

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
    """Whether there is a whole file that says it was made from all of this."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            return made_from.items() <= (file.metadata() or {}).items()
    except SafetensorError:
        return False
