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
from longnet.slides.hdf5 import read_h5
from longnet.slides.units import check_unit, to_pixels

SLIDE_FORMATS = (".pt", ".npz", ".safetensors", ".h5", ".hdf5")

# Names that GigaPath, CLAM, TRIDENT and STAMP use, and plain words.
_EMBEDDINGS = ("tile_embeds", "features", "embeddings", "feats")
_COORDS = ("coords", "coordinates")

# Arrays by name (None for other names), and the attributes that tell the unit.
_Contents = tuple[Mapping[str, Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Slide:
    """``embeddings`` (L, C) float32, ``coords`` (L, 2) float32: pixels, x then y.

    ``tile_size`` is the side of a tile in pixels of the coordinates, None where the file does not say it;
    ``tile_size_from`` says in words what it was taken from. ``mpp`` are the microns of a pixel, None where they are not known.
    """

    embeddings: Tensor
    coords: Tensor
    tile_size: int | None = None
    tile_size_from: str = ""
    mpp: float | None = None


def read_slide(path: str | Path, *, unit: str | None = None, mpp: float | None = None) -> Slide:
    """Read a ``.pt`` (with ``weights_only=True``), ``.npz`` (without pickles), ``.safetensors``, ``.h5`` or ``.hdf5``.

    It holds embeddings, called tile_embeds, features, embeddings or feats, (L, C) or (1, L, C), and coords or coordinates,
    (L, 2) or (1, L, 2), of any real dtype, or of the fields x and y; coordinates not in bfloat16, nor float16 beyond 2,048. The
    arrays of an HDF5 file must lie in the file itself, not behind a link.

    Args:
        path: the file.
        unit: of the coordinates: ``"pixels"``, ``"um"`` (microns) or ``"tiles"`` (columns and rows). None: what an HDF5 file
            says in TRIDENT's attribute patch_size_level0 of the coordinates (pixels, and the tile size) or in STAMP's
            tile_size_um and tile_size_px (microns); else pixels, where numbers may be such: without fractions, of embeddings
            that are not called feats as STAMP's, not many tiles to a cell of 256 pixels.
        mpp: microns of a pixel, for ``"um"``; None: the file's tile_size_um / tile_size_px.

    Raises:
        ValueError: another format, a file that is not what its name says, arrays that are missing, empty, not finite, or of
            other shapes or dtypes, or a unit that is not known. OSError: a file that is not there.
    """
    check_unit(unit, mpp)
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SLIDE_FORMATS:
        raise ValueError(f"{path} has the suffix {path.suffix!r}: expected one of {SLIDE_FORMATS}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        contents, said = _READERS[suffix](path)
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
    if not len(embeddings):
        raise ValueError(f"{path} has no tile: expected at least one")
    embeddings, coords = embeddings.float(), coords.double()
    for name, values in (("embeddings", embeddings), ("coords", coords)):
        if not bool((finite := values.isfinite().all(1)).all()):
            row = int((~finite).nonzero()[0])
            raise ValueError(
                f"{path} has {name} that are not finite in {int((~finite).sum())} of {len(values)} tiles, tile {row} the first: "
                "expected finite numbers"
            )
    pixels = to_pixels(path, coords, said, "feats" in contents, unit, mpp)
    return Slide(embeddings, pixels.coords.float(), pixels.tile_size, pixels.tile_size_from, pixels.mpp)


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
    if names is _COORDS and isinstance(value, np.ndarray) and sorted(value.dtype.names or ()) == ["x", "y"]:
        value = np.stack([value["x"], value["y"]], axis=-1)
    if isinstance(value, np.ndarray) and value.dtype.kind in "iuf" and value.dtype.itemsize <= 8:
        # torch takes only the machine's byte order.
        value = torch.as_tensor(value.astype(value.dtype.newbyteorder("="), copy=False))
    if not isinstance(value, Tensor) or value.is_complex() or value.dtype == torch.bool:
        kind = getattr(value, "dtype", type(value).__name__)
        raise ValueError(f"{path}: {present[0]} has dtype {kind}: expected an array of real numbers")
    return value[0] if value.dim() == 3 and value.shape[0] == 1 else value


def _read_tensors(path: Path) -> _Contents:
    contents = load_tensors(path)
    if not isinstance(contents, Mapping):
        raise ValueError(f"it holds a {type(contents).__name__}, expected tensors by name")
    return {str(name): value for name, value in contents.items()}, {}


def _read_npz(path: Path) -> _Contents:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] if name in (*_EMBEDDINGS, *_COORDS) else None for name in file.files}, {}


def _read_h5(path: Path) -> _Contents:
    return read_h5(path, (*_EMBEDDINGS, *_COORDS), _COORDS)


_READERS = {
    ".pt": _read_tensors,
    ".npz": _read_npz,
    ".safetensors": _read_tensors,
    ".h5": _read_h5,
    ".hdf5": _read_h5,
}
