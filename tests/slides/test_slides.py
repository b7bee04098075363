"""Slides from files of four formats, and heat maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import save_file

from longnet.slides import heatmap, read_slide


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    if path.suffix == ".pt":
        torch.save(tensors, path)
    elif path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array


@pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors", ".h5"])
@pytest.mark.parametrize("names", [("tile_embeds", "coords"), ("features", "coordinates"), ("embeddings", "coords")])
def test_every_format_and_name(tmp_path: Path, suffix: str, names: tuple[str, str]) -> None:
    x, coords = torch.randn(1, 5, 3).half(), torch.randint(1000, (5, 2))
    path = tmp_path / f"slide{suffix}"
    write(path, {names[0]: x, names[1]: coords})
    slide = read_slide(str(path))
    assert torch.equal(slide.embeddings, x[0].float()) and torch.equal(slide.coords, coords.float())


@pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors", ".h5"])
def test_files_that_are_none(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"slide{suffix}"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=f"cannot be read as {suffix}"):
        read_slide(path)
    write(path, {"features": torch.randn(5, 3)})
    with pytest.raises(ValueError, match="expected exactly one of .'coords'"):
        read_slide(path)
    write(path, {"features": torch.randn(5, 3), "coords": torch.randn(4, 2)})
    with pytest.raises(ValueError, match=r"expected \(L, C\) and \(L, 2\)"):
        read_slide(path)
    write(path, {"features": torch.randn(5, 3), "tile_embeds": torch.randn(5, 3), "coords": torch.randn(5, 2)})
    with pytest.raises(ValueError, match="expected exactly one of .'tile_embeds'"):
        read_slide(path)
    write(path, {"features": torch.randn(5, 3) > 0, "coords": torch.randn(5, 2)})
    with pytest.raises(ValueError, match="expected real numbers"):
        read_slide(path)


def test_other_paths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has the suffix '.csv'"):
        read_slide(tmp_path / "x.csv")
    with pytest.raises(FileNotFoundError):
        read_slide(tmp_path / "x.pt")


def test_a_pickle_in_a_pt_is_not_run(tmp_path: Path) -> None:
    torch.save({"features": Path("x")}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="cannot be read as .pt"):
        read_slide(tmp_path / "x.pt")


def test_a_heat_map_has_a_cell_for_every_tile(tmp_path: Path) -> None:
    cell = torch.cartesian_prod(torch.arange(40), torch.arange(30))
    # Bright to the right, and a hole at the top left.
    cell = cell[(cell >= 10).any(1)]
    path = tmp_path / "map.png"
    heatmap(path, cell[:, 0].float(), (cell * 256).float() + 5000, title="slide")
    picture = imread(path)[..., :3]
    height, width = picture.shape[:2]
    light = picture.sum(-1)
    row = light[height * 6 // 10, : width * 7 // 10]
    inside = row[row < 2.9]
    assert inside[-30:].mean() > inside[:30].mean() + 0.5
    # The hole shows the background.
    assert light[int(height * 0.12), int(width * 0.1)] == pytest.approx(3.0, abs=0.01)


def test_bad_heat_maps(tmp_path: Path) -> None:
    path, coords = tmp_path / "x.png", torch.zeros(3, 2)
    for weights, where, tile, match in [
        (torch.zeros(4), coords, 256, "weights has shape"),
        (torch.zeros(0), coords[:0], 256, "weights is empty"),
        (torch.tensor([0.0, torch.nan, 0.0]), coords, 256, "not finite"),
        (torch.zeros(3), coords, 0, "tile_size=0"),
    ]:
        with pytest.raises(ValueError, match=match):
            heatmap(path, weights, where, tile_size=tile)
    assert not path.exists()
