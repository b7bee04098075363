"""A slide's tile embeddings and their coordinates, as other tools leave them in files."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longnet.gigapath.checkpoint import load_tensors

SLIDE_FORMATS = (".pt", ".npz", ".safetensors", ".h5")

# What GigaPath, CLAM and TRIDENT call them, and plain words.
_EMBEDDINGS = ("tile_embeds", "features", "embeddings")
_COORDS = ("coords", "coordinates")


@dataclass(frozen=True)
class Slide:
    """``embeddings`` (L, C) float32, ``coords`` (L, 2) float32: pixels, x then y."""

    embeddings: Tensor
    coords: Tensor


def read_slide(path: str | Path) -> Slide:
    """Read a ``.pt`` (with ``weights_only=True``), ``.npz`` (without pickles), ``.safetensors`` or ``.h5``.

    It holds embeddings, called tile_embeds, features or embeddings, (L, C) or (1, L, C), and coords or coordinates, (L, 2) or
    (1, L, 2), of any real dtype.

    Raises:
        ValueError: another format, a file that is not what its name says, or tensors that are missing or of other shapes.
        OSError: a file that cannot be read.
    """
    path = Path(path)
    if path.suffix not in SLIDE_FORMATS:
        raise ValueError(f"{path} has the suffix {path.suffix!r}: expected one of {SLIDE_FORMATS}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file")
    try:
        found = _READERS[path.suffix](path)
    except (ValueError, OSError, zipfile.BadZipFile, EOFError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix}: {error}") from None
    embeddings, coords = _pick(path, found, _EMBEDDINGS), _pick(path, found, _COORDS)
    if embeddings.dim() != 2 or tuple(coords.shape) != (embeddings.shape[0], 2):
        raise ValueError(
            f"{path} has embeddings {tuple(embeddings.shape)} and coords {tuple(coords.shape)}: expected (L, C) and (L, 2)"
        )
    return Slide(embeddings, coords)


def _pick(path: Path, found: Mapping[str, Any], names: tuple[str, ...]) -> Tensor:
    given = [name for name in names if name in found]
    if len(given) != 1:
        raise ValueError(f"{path} holds {sorted(found)}: expected exactly one of {names}")
    tensor = torch.as_tensor(found[given[0]])
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{path}: {given[0]} has dtype {tensor.dtype}: expected real numbers")
    return (tensor[0] if tensor.dim() == 3 and tensor.shape[0] == 1 else tensor).float()


def _read_tensors(path: Path) -> Mapping[str, Any]:
    found = load_tensors(path)
    if not isinstance(found, Mapping):
        raise ValueError(f"it holds a {type(found).__name__}, expected tensors by name")
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}


def _read_npz(path: Path) -> Mapping[str, Any]:
    import numpy as np

    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files if name in (*_EMBEDDINGS, *_COORDS)}


def _read_h5(path: Path) -> Mapping[str, Any]:
    import h5py  # type: ignore[import-untyped]

    with h5py.File(path, "r") as file:
        return {name: file[name][()] for name in file if name in (*_EMBEDDINGS, *_COORDS)}


_READERS = {".pt": _read_tensors, ".npz": _read_npz, ".safetensors": _read_tensors, ".h5": _read_h5}
