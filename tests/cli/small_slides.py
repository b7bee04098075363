"""Small random slides, and what the encoder gives for them."""

from __future__ import annotations

from pathlib import Path

import h5py
import torch
from safetensors.torch import load_file, save_file

from longnet.gigapath import SlideEncoder


def slide(path: Path, tiles: int) -> Path:
    generator = torch.Generator().manual_seed(tiles)
    x = torch.randn(tiles, 1536, generator=generator)
    cell = torch.randperm(400, generator=generator)[:tiles]
    coords = torch.stack((cell // 20, cell % 20), 1) * 256
    path.parent.mkdir(exist_ok=True)
    save_file({"features": x, "coords": coords}, path)
    return path


def expected(weights: Path, path: Path, all_layers: bool = False) -> torch.Tensor:
    model = SlideEncoder.from_checkpoint(weights)
    held = load_file(path)
    with torch.no_grad():
        return torch.cat(model(held["features"][None], held["coords"][None], all_layers))


def trident(path: Path, tile_size: object, scale: int, tiles: int = 40) -> Path:
    """A slide as TRIDENT writes it; the tissue depends on the number of tiles alone."""
    held = load_file(slide(path.with_suffix(".safetensors"), tiles))
    path.with_suffix(".safetensors").unlink()
    with h5py.File(path, "w") as file:
        file["features"] = held["features"].numpy()
        file["coords"] = held["coords"].numpy() * scale
        if tile_size is not None:
            file["coords"].attrs["patch_size_level0"] = tile_size
    return path
