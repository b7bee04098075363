"""Arrays and attributes of an HDF5 file, of the file itself alone."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from longnet.slides.units import STAMP, TILE_SIZE


def read_h5(path: Path, names: Collection[str], coords: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays by name, None for those that are not in ``names``; attributes that tell the unit of ``coords``)."""
    import h5py  # type: ignore[import-untyped]

    contents: dict[str, Any] = {}
    with h5py.File(path, "r") as file:
        said = {name: file.attrs[name] for name in STAMP if name in file.attrs}
        for name in file:
            contents[name] = None
            if name not in names:
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
            if name in coords and TILE_SIZE in dataset.attrs:
                said[TILE_SIZE] = dataset.attrs[TILE_SIZE]
    return contents, said
