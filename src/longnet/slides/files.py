"""A slide's tile embeddings and coordinates from the files that other tools write, and its results as safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from longnet.gigapath.batches import check_coords
from longnet.gigapath.checkpoint import load_tensors

SLIDE_FORMATS = (".pt", ".npz", ".safetensors", ".h5", ".hdf5")

# Names that GigaPath, CLAM and TRIDENT use, and plain words.
_EMBEDDINGS = ("tile_embeds", "features", "embeddings")
_COORDS = ("coords", "coordinates")
# TRIDENT's attribute of coords: the side of a tile in pixels of the coordinates, 512 for a tile of 256 pixels of a 40x slide.
_TILE_SIZE = "patch_size_level0"
_LARGEST_TILE = 1 << 20

# Arrays by name (None for other names), and the tile size as the file holds it.
_Contents = tuple[Mapping[str, Any], Any]


@dataclass(frozen=True)
class Slide:
    """``embeddings`` (L, C) float32, ``coords`` (L, 2) float32: pixels, x then y.

    ``tile_size`` is the side of a tile in pixels of the coordinates, None where the file does not say it.
    """

    embeddings: Tensor
    coords: Tensor
    tile_size: int | None = None


def read_slide(path: str | Path) -> Slide:
    """Read a ``.pt`` (with ``weights_only=True``), ``.npz`` (without pickles), ``.safetensors``, ``.h5`` or ``.hdf5``.

    It holds embeddings, called tile_embeds, features or embeddings, (L, C) or (1, L, C), and coords or coordinates, (L, 2) or
    (1, L, 2), of any real dtype; coordinates not in half precision. An HDF5 file may say the tile size as TRIDENT does, in the
    attribute patch_size_level0 of the coordinates. Its arrays must lie in the file itself, not behind a link.

    Raises:
        ValueError: another format, a file that is not what its name says, or arrays that are missing, not finite, or of other
            shapes or dtypes. OSError: a file that is not there.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SLIDE_FORMATS:
        raise ValueError(f"{path} has the suffix {path.suffix!r}: expected one of {SLIDE_FORMATS}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        contents, tile_size = _READERS[suffix](path)
    except (MemoryError, ImportError):
        raise
    except Exception as error:
        # Readers raise errors of any type for bytes of another format.
        raise ValueError(f"{path} cannot be read as {suffix}: {error}") from None
    embeddings, coords = _array_of(path, contents, _EMBEDDINGS), _array_of(path, contents, _COORDS)
    try:
        check_coords(coords)
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from None
    if embeddings.dim() != 2 or tuple(coords.shape) != (embeddings.shape[0], 2):
        raise ValueError(
            f"{path} has embeddings {tuple(embeddings.shape)} and coords {tuple(coords.shape)}: expected (L, C) and (L, 2)"
        )
    embeddings, coords = embeddings.float(), coords.float()
    for name, values in (("embeddings", embeddings), ("coords", coords)):
        if not bool((finite := values.isfinite().all(1)).all()):
            row = int((~finite).nonzero()[0])
            raise ValueError(
                f"{path} has {name} that are not finite in {int((~finite).sum())} of {len(values)} tiles, tile {row} the first: "
                "expected finite numbers"
            )
    return Slide(embeddings, coords, None if tile_size is None else _tile_size_of(path, tile_size))


def result_bytes(tensors: Mapping[str, Tensor], made_from: Mapping[str, str]) -> bytes:
    """The content of a result's file; its metadata say what it was made from."""
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


def _array_of(path: Path, contents: Mapping[str, Any], names: tuple[str, ...]) -> Tensor:
    present = [name for name in names if name in contents]
    if len(present) != 1:
        raise ValueError(f"{path} holds {sorted(contents)}: expected exactly one of {names}")
    value = contents[present[0]]
    if isinstance(value, np.ndarray) and value.dtype.kind in "iuf" and value.dtype.itemsize <= 8:
        # torch takes only the machine's byte order.
        value = torch.as_tensor(value.astype(value.dtype.newbyteorder("="), copy=False))
    if not isinstance(value, Tensor) or value.is_complex() or value.dtype == torch.bool:
        kind = getattr(value, "dtype", type(value).__name__)
        raise ValueError(f"{path}: {present[0]} has dtype {kind}: expected an array of real numbers")
    return value[0] if value.dim() == 3 and value.shape[0] == 1 else value


def _tile_size_of(path: Path, value: Any) -> int:
    size = np.asarray(value)
    if (
        size.size != 1
        or size.dtype.kind not in "iuf"
        or not np.isfinite(size)
        or not 1 <= size <= _LARGEST_TILE
        or size != np.floor(size)
    ):
        raise ValueError(
            f"{path}: the attribute {_TILE_SIZE} of coords is {value!r}: expected a whole number of pixels from 1 to "
            f"{_LARGEST_TILE:,}"
        )
    return int(size.item())


def _read_tensors(path: Path) -> _Contents:
    contents = load_tensors(path)
    if not isinstance(contents, Mapping):
        raise ValueError(f"it holds a {type(contents).__name__}, expected tensors by name")
    return {str(name): value for name, value in contents.items()}, None


def _read_npz(path: Path) -> _Contents:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] if name in (*_EMBEDDINGS, *_COORDS) else None for name in file.files}, None


def _read_h5(path: Path) -> _Contents:
    import h5py  # type: ignore[import-untyped]

    contents: dict[str, Any] = {}
    tile_size = None
    with h5py.File(path, "r") as file:
        for name in file:
            contents[name] = None
            if name not in (*_EMBEDDINGS, *_COORDS):
                continue
            # A link, external storage and a virtual dataset can each bring in any other file of the machine.
            link = file.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise ValueError(f"{name} is a {type(link).__name__}: expected a dataset of the file itself")
            dataset = file[name]
            if not isinstance(dataset, h5py.Dataset):
                raise ValueError(f"{name} is a {type(dataset).__name__}: expected a dataset")
            if dataset.external or dataset.is_virtual:
                kind = "is a virtual dataset" if dataset.is_virtual else "has external storage"
                raise ValueError(f"{name} {kind}: expected its numbers in the file itself")
            contents[name] = np.asarray(dataset[()])
            if name in _COORDS:
                tile_size = dataset.attrs.get(_TILE_SIZE)
    return contents, tile_size


_READERS = {
    ".pt": _read_tensors,
    ".npz": _read_npz,
    ".safetensors": _read_tensors,
    ".h5": _read_h5,
    ".hdf5": _read_h5,
}
