"""Coordinates in the units of other tools, as pixels; refused where neither the file nor its numbers show the unit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from longnet.gigapath.positions import in_tiles
from longnet.slides.folders import counted

UNITS = ("pixels", "um", "tiles")

# TRIDENT's attribute of coords: the side of a tile in pixels of the coordinates, 512 for a tile of 256 pixels of a 40x slide.
TILE_SIZE = "patch_size_level0"
# STAMP's attributes of a file; tile_size with unit "um" is tile_size_um of its version 2.0.
STAMP = ("unit", "tile_size", "tile_size_um", "tile_size_px")
# Where nothing says the side of a tile.
DEFAULT_TILE = 256
_LARGEST_TILE = 1 << 20
# More tiles than this in a cell of DEFAULT_TILE pixels on average: not pixels, or tiles that overlap very much.
_MOST_A_CELL = 8


class Pixels(NamedTuple):
    """coords (L, 2) in pixels; the side of a tile in these, None where it is not known, and what says so; microns a pixel."""

    coords: Tensor
    tile_size: int | None
    tile_size_from: str
    mpp: float | None = None


def check_unit(unit: str | None, mpp: float | None) -> None:
    """Raises ValueError for a unit that there is not, and for an mpp that is not positive or has no use."""
    if unit is not None and unit not in UNITS:
        raise ValueError(f"unit={unit!r} is unknown: expected one of {UNITS}")
    if mpp is not None and (unit != "um" or not 0.0 < mpp < float("inf")):
        raise ValueError(f"mpp={mpp} with unit={unit!r}: expected a positive number, with unit='um' alone")


def to_pixels(
    path: Path, coords: Tensor, said: Mapping[str, Any], stamp: bool, unit: str | None, mpp: float | None
) -> Pixels:
    """A slide's coordinates in pixels.

    Args:
        path: for errors.
        coords: (L, 2), finite.
        said: the attributes TILE_SIZE and STAMP that the file has.
        stamp: whether the embeddings have STAMP's name, feats.
        unit: of the coordinates; None: what the file says or its numbers show.
        mpp: microns of a pixel, for "um"; None: the file's.

    Raises:
        ValueError: a unit that is not known, or another than the file says; attributes that hold no sizes.
    """
    level0 = whole(path, TILE_SIZE, said[TILE_SIZE]) if TILE_SIZE in said else None
    name = str(said.get("unit", "")).lower()
    um = said.get("tile_size_um", said.get("tile_size") if name == "um" else None)
    told = _told(level0, name, um)
    if unit is not None and told is not None and unit != told[0]:
        raise ValueError(f"unit={unit!r}, but {path} says {told[0]} ({told[1]}): expected unit={told[0]!r}, or none")
    if unit is None:
        unit = _unit_of(path, coords, name, stamp) if told is None else told[0]
    if unit == "tiles":
        return Pixels(coords * DEFAULT_TILE, DEFAULT_TILE, "coordinates in tiles")
    if unit == "pixels":
        return Pixels(coords, level0, f"{TILE_SIZE} of the slide" if level0 else "")
    side = None if um is None else _positive(path, "the tile size in um", um)
    if mpp is not None:
        tile = None if side is None else round(side / mpp)
    elif side is None:
        raise ValueError(
            f"{path} has coordinates in um and no tile_size_um: expected mpp, the microns of a pixel (--mpp)"
        )
    else:
        # Positions depend on coordinates in tiles alone: any number of pixels a tile gives the same.
        tile = whole(path, "tile_size_px", said["tile_size_px"]) if "tile_size_px" in said else DEFAULT_TILE
        mpp = side / tile
    # What float32 microns lose must not move a tile below its own cell's edge.
    said_by = f"coordinates in um, {mpp:.4g} a pixel" if tile else ""
    return Pixels((coords.double() / mpp).round(), tile, said_by, mpp)


def whole(path: Path, name: str, value: Any) -> int:
    """``value`` as a side of a tile in pixels.

    Raises:
        ValueError: it is no whole number from 1 to 1,048,576.
    """
    size = np.asarray(value)
    good = size.size == 1 and size.dtype.kind in "iuf" and np.isfinite(size) and size == np.floor(size)
    if not good or not 1 <= size <= _LARGEST_TILE:
        where = f"the attribute {name}" + (" of coords" if name == TILE_SIZE else "")
        raise ValueError(f"{path}: {where} is {value!r}: expected a whole number of pixels from 1 to {_LARGEST_TILE:,}")
    return int(size.item())


def _positive(path: Path, name: str, value: Any) -> float:
    size = np.asarray(value)
    if size.size != 1 or size.dtype.kind not in "iuf" or not np.isfinite(size) or not size > 0:
        raise ValueError(f"{path}: {name} is {value!r}: expected a positive number")
    return float(size.item())


def _told(level0: int | None, name: str, um: Any) -> tuple[str, str] | None:
    """The unit that a file says, and by what."""
    if um is not None:
        return "um", f"tile size {um} um"
    if level0 is not None:
        return "pixels", f"{TILE_SIZE}={level0}"
    return ("pixels", f"unit={name}") if name in ("px", "pixel", "pixels") else None


def _unit_of(path: Path, coords: Tensor, name: str, stamp: bool) -> str:
    """What the numbers show."""
    cells = len(in_tiles(coords, DEFAULT_TILE).unique(dim=0))
    if name:
        reason = f"its attribute unit is {name!r}"
    elif stamp:
        reason = "its embeddings are called feats, as STAMP's, without STAMP's attribute tile_size_um"
    elif bool((coords != coords.floor()).any()):
        reason = "coordinates have fractions, as microns have"
    elif len(coords) > _MOST_A_CELL * cells:
        lie = f"its {counted(len(coords), 'tile')} lie in {counted(cells, 'cell')} of {DEFAULT_TILE} pixels"
        reason = f"{lie}, as numbers of tiles do"
    else:
        return "pixels"
    raise ValueError(f"{path}: the unit of coords is not known: {reason}; expected unit= one of {UNITS} (--unit)")
