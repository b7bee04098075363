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

from longnet.slides import SLIDE_FORMATS, Slide, heatmap, join_slides, read_slide


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


@pytest.mark.parametrize("suffix", SLIDE_FORMATS)
@pytest.mark.parametrize("names", [("tile_embeds", "coords"), ("features", "coordinates"), ("embeddings", "coords")])
def test_every_format_and_name(tmp_path: Path, suffix: str, names: tuple[str, str]) -> None:
    x, coords = torch.randn(1, 5, 3).half(), torch.arange(10).view(5, 2) * 100
    path = tmp_path / f"slide{suffix}"
    write(path, {names[0]: x, names[1]: coords})
    slide = read_slide(str(path))
    assert torch.equal(slide.embeddings, x[0].float()) and torch.equal(slide.coords, coords.float())
    assert slide.tile_size is None
    renamed = path.rename(tmp_path / f"slide{suffix.upper()}")
    assert torch.equal(read_slide(renamed).coords, slide.coords)


@pytest.mark.parametrize("suffix", SLIDE_FORMATS)
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
    with pytest.raises(ValueError, match="expected an array of real numbers"):
        read_slide(path)
    # The message shows the names that are there.
    write(path, {"vectors": torch.randn(5, 3), "coords": torch.randn(5, 2)})
    with pytest.raises(ValueError, match=r"holds \['coords', 'vectors'\]: expected exactly one of .'tile_embeds'"):
        read_slide(path)
    write(path, {"features": torch.randn(5, 3), "coords": (3000 * torch.ones(5, 2)).half()})
    with pytest.raises(ValueError, match="slide.*coords has dtype torch.float16, which rounds pixels beyond 2,048"):
        read_slide(path)


@pytest.mark.parametrize(
    "coords",
    [
        np.zeros(5, dtype=[("x", "i8"), ("z", "i8")]),
        np.full((5, 2), b"256"),
        np.full((5, 2), "256", dtype=h5py.string_dtype()),
        np.zeros((5, 2), complex),
        np.full((5, 2), np.inf, np.float16),
        np.float32(1.0),
        h5py.Empty("f4"),
    ],
    ids=["structured", "bytes", "strings", "complex", "half", "scalar", "empty"],
)
def test_coordinates_that_are_no_pixels(tmp_path: Path, coords: Any) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["features"] = np.ones((5, 3), np.float32)
        file["coords"] = coords
    with pytest.raises(ValueError, match=r"x\.h5.*coords.* expected"):
        read_slide(tmp_path / "x.h5")


@pytest.mark.parametrize("name", ["features", "coords"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite(tmp_path: Path, name: str, value: float) -> None:
    tensors = {"features": torch.randn(5, 3), "coords": torch.zeros(5, 2)}
    tensors[name][3, 1] = value
    save_file(tensors, tmp_path / "x.safetensors")
    said = {"features": "embeddings", "coords": "coords"}[name]
    with pytest.raises(
        ValueError, match=rf"x\.safetensors has {said} that are not finite in 1 of 5 tiles, tile 3 the first"
    ):
        read_slide(tmp_path / "x.safetensors")


STAMP = {"unit": "um", "tile_size_um": 256.0, "tile_size_px": 224}


def write_h5(path: Path, coords: Any, name: str = "features", **attributes: Any) -> Path:
    with h5py.File(path, "w") as file:
        file[name], file["coords"] = np.ones((len(coords), 3), np.float32), coords
        file.attrs.update(attributes)
    return path


@pytest.mark.parametrize(
    "kind", ["i4", "u2", "f4", "f8", "f2", ">i8", [("x", "i4"), ("y", "f8")], [("y", "i8"), ("x", "u2")]]
)
def test_pixels_of_every_kind(tmp_path: Path, kind: Any) -> None:
    coords = np.arange(0, 1800, 300).reshape(3, 2)
    given: Any = coords.astype(kind) if isinstance(kind, str) else np.zeros(3, dtype=kind)
    if given.dtype.names:
        given["x"], given["y"] = coords.T
    assert read_slide(write_h5(tmp_path / "x.h5", given)).coords.tolist() == coords.tolist()


@pytest.mark.parametrize(
    ("attributes", "tile", "micron"),
    [
        (STAMP, 224, 224 / 256),
        ({"unit": "um", "tile_size": 256.0, "tile_size_px": np.int64(224)}, 224, 224 / 256),
        # Without pixels of a tile, positions are those of any number of them.
        ({"unit": "um", "tile_size": 256}, 256, 1.0),
        ({"tile_size_um": 128.0, "tile_size_px": 256}, 256, 2.0),
    ],
)
def test_microns_that_stamp_writes(tmp_path: Path, attributes: dict[str, Any], tile: int, micron: float) -> None:
    cell = np.array([[0, 0], [1, 0], [13, 299], [7, 6]])
    side = attributes.get("tile_size_um", attributes.get("tile_size"))
    # As float32 loses them.
    coords = np.nextafter((cell * side).astype(np.float32), np.float32(0))
    slide = read_slide(write_h5(tmp_path / "x.h5", coords, "feats", **attributes))
    assert slide.tile_size == tile and slide.coords.tolist() == (cell * tile).tolist()
    assert slide.tile_size_from == f"coordinates in um, {1 / micron:.4g} a pixel"


def test_units_that_are_not_known_are_refused_by_name(tmp_path: Path) -> None:
    path, cell = tmp_path / "x.h5", np.stack(np.divmod(np.arange(40), 8), 1)
    for coords, name, attributes, match in [
        (cell * 224, "feats", {}, "called feats, as STAMP's, without STAMP's attribute tile_size_um"),
        (cell * 256 + 0.5, "features", {}, "coordinates have fractions, as microns have"),
        (cell, "features", {}, "its 40 tiles lie in 1 cell of 256 pixels, as numbers of tiles do"),
        (cell * 256, "features", {"unit": "mm"}, "its attribute unit is 'mm'"),
    ]:
        write_h5(path, coords, name, **attributes)
        with pytest.raises(ValueError, match=rf"x\.h5: the unit of coords is not known: .*{match}.*\(--unit\)"):
            read_slide(path)
        slide = read_slide(path, unit="pixels")
        assert slide.coords.tolist() == coords.tolist() and slide.tile_size is None
    write_h5(path, cell * 128.0)
    slide = read_slide(path, unit="um", mpp=0.5)
    assert slide.coords.tolist() == (cell * 256).tolist() and slide.tile_size is None
    assert read_slide(write_h5(path, cell * 128.0, **STAMP), unit="um", mpp=0.5).tile_size == 512
    with pytest.raises(ValueError, match=r"x\.h5 has coordinates in um and no tile_size_um: expected mpp"):
        read_slide(write_h5(path, cell * 128.0), unit="um")
    slide = read_slide(write_h5(path, cell), unit="tiles")
    assert slide.coords.tolist() == (cell * 256).tolist() and slide.tile_size == 256
    for value, match in [(0.0, "expected a positive number"), ("wide", "expected a positive number")]:
        with pytest.raises(ValueError, match=match):
            read_slide(write_h5(path, cell, **STAMP | {"tile_size_um": value}))
    with pytest.raises(ValueError, match=r"x\.h5: the attribute tile_size_px is .*0.*whole number of pixels"):
        read_slide(write_h5(path, cell, **STAMP | {"tile_size_px": 0}))
    for unit, mpp, match in [
        ("feet", None, "'feet' is unknown"),
        ("um", -1.0, "mpp=-1.0"),
        (None, 0.5, "unit='um' alone"),
    ]:
        with pytest.raises(ValueError, match=match):
            read_slide(path, unit=unit, mpp=mpp)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no tile"):
        read_slide(write_h5(path, cell[:0]))


def test_slides_are_joined_along_x() -> None:
    x = torch.randn(5, 3)
    one, two = (
        Slide(x[:3], torch.tensor([[0.0, 7], [700, 0], [5, 9]])),
        Slide(x[3:], torch.tensor([[3.0, 1], [9, 2]]), 256),
    )
    joined = join_slides([one, two, one], 256)
    assert joined.coords[:, 0].tolist() == [0, 700, 5, 959, 965, 1221, 1921, 1226]
    assert joined.coords[:, 1].tolist() == [7, 0, 9, 1, 2, 7, 0, 9]
    assert torch.equal(joined.embeddings, torch.cat((x, x[:3]))) and joined.tile_size == 256
    for slides, match in [
        ([], "slides is empty"),
        ([one, two], "tiles of 256 pixels: expected 512"),
        ([one, Slide(x[:, :2], torch.zeros(5, 2))], "has 2 channels"),
    ]:
        with pytest.raises(ValueError, match=match):
            join_slides(slides, 512)


def test_another_machines_byte_order(tmp_path: Path) -> None:
    x, coords = np.arange(15, dtype=">f4").reshape(5, 3), np.arange(10, dtype=">i8").reshape(5, 2)
    np.savez(tmp_path / "x.npz", features=x, coords=coords)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["features"], file["coords"] = x, coords
    for name in ("x.npz", "x.h5"):
        slide = read_slide(tmp_path / name)
        assert slide.embeddings.tolist() == x.tolist() and slide.coords.tolist() == coords.tolist()


@pytest.mark.parametrize("name", ["coords", "coordinates"])
@pytest.mark.parametrize("value", [512, np.int64(512), np.float32(512), np.array([512])])
def test_the_tile_size_that_trident_writes(tmp_path: Path, name: str, value: Any) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["features"] = np.ones((5, 3), np.float32)
        file[name] = np.arange(10).reshape(5, 2)
        file[name].attrs["patch_size_level0"] = value
    tile_size = read_slide(tmp_path / "x.h5").tile_size
    assert tile_size == 512 and type(tile_size) is int


@pytest.mark.parametrize("value", [0, -512, 0.5, np.nan, np.inf, "512", [256, 512], 2**63 - 1, True, h5py.Empty("i8")])
def test_a_tile_size_that_is_none(tmp_path: Path, value: Any) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["features"] = np.ones((5, 3), np.float32)
        file["coords"] = np.arange(10).reshape(5, 2)
        file["coords"].attrs["patch_size_level0"] = value
    with pytest.raises(
        ValueError, match=r"x\.h5: the attribute patch_size_level0 of coords is .*whole number of pixels"
    ):
        read_slide(tmp_path / "x.h5")


@pytest.mark.parametrize("name", ["features", "coords"])
@pytest.mark.parametrize("way", ["storage", "link", "soft", "through", "virtual", "inner", "broken", "group"])
def test_numbers_of_other_files_are_refused(tmp_path: Path, name: str, way: str) -> None:
    shape = {"features": (4, 3), "coords": (4, 2)}
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file[name] = np.ones(shape[name], np.float32)
    path = tmp_path / "x.h5"
    layout = h5py.VirtualLayout(shape[name], "f4")
    with h5py.File(path, "w") as file:
        for other in set(shape) - {name}:
            file[other] = np.ones(shape[other], np.float32)
        if way in ("storage", "inner"):
            at = name if way == "storage" else "hidden"
            file.create_dataset(at, shape[name], "f4", external=[(str(secret), 0, 48)])
        if way == "link":
            file[name] = h5py.ExternalLink(secret, name)
        elif way in ("soft", "through"):
            file["out"] = h5py.ExternalLink(secret, name if way == "soft" else "/")
            file[name] = h5py.SoftLink("/out" if way == "soft" else f"/out/{name}")
        elif way in ("virtual", "inner"):
            source = (secret, name) if way == "virtual" else (".", "hidden")
            layout[:] = h5py.VirtualSource(*source, shape[name])
            file.create_virtual_dataset(name, layout)
        elif way == "broken":
            file[name] = h5py.SoftLink("/nowhere")
        elif way == "group":
            file.create_group(name)
    with pytest.raises(ValueError, match=rf"x\.h5 cannot be read as \.h5: {name} (is|has) .*: expected"):
        read_slide(path)


def test_other_paths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has the suffix '.csv'"):
        read_slide(tmp_path / "x.csv")
    with pytest.raises(FileNotFoundError):
        read_slide(tmp_path / "x.pt")


def test_a_pickle_in_a_pt_is_not_run(tmp_path: Path) -> None:
    torch.save({"features": Path("x")}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="cannot be read as .pt: .*UnpicklingError: it (holds|is) [^\n]*$"):
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


def test_a_title_is_no_formula(tmp_path: Path) -> None:
    coords = torch.tensor([[0, 0], [200, 10]], dtype=torch.uint8)
    pictures = []
    for number, title in enumerate([r"a$\frac$", "a$x$", "ax", "a\udcff"]):
        path = tmp_path / f"{number}.png"
        heatmap(path, torch.ones(2), coords, title=title, label=title)
        pictures.append(path.read_bytes())
    assert len(set(pictures)) == 4


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
    with pytest.raises(TypeError, match="coords has dtype torch.bfloat16"):
        heatmap(path, torch.zeros(3), coords.bfloat16())
    assert not path.exists()


def test_a_heat_map_shows_tiles_that_lie_far_apart(tmp_path: Path) -> None:
    path = tmp_path / "far.png"
    heatmap(path, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[0, 0], [255_000, 0], [0, 255_000]]))
    picture = imread(path)[..., :3]
    # The middle one is red, and stands at the right edge, left of the bar.
    middle = picture[:, picture.shape[1] // 2 : picture.shape[1] * 86 // 100]
    assert (middle[..., 0] - middle[..., 1] > 0.3).sum() >= 25


@pytest.mark.parametrize(
    ("attributes", "unit", "said"),
    [
        ({"patch_size_level0": 512}, "um", r"unit='um', but .*x.h5 says pixels \(patch_size_level0=512\)"),
        ({"patch_size_level0": 512}, "tiles", "says pixels"),
        ({"unit": "px"}, "um", r"says pixels \(unit=px\)"),
        (STAMP, "pixels", r"unit='pixels', but .*x.h5 says um \(tile size .* um\)"),
    ],
)
def test_a_unit_that_the_file_denies_is_refused(
    tmp_path: Path, attributes: dict[str, object], unit: str, said: str
) -> None:
    path = write_h5(tmp_path / "x.h5", torch.arange(12).view(6, 2).numpy() * 512.0, **attributes)
    with h5py.File(path, "a") as file:
        file["coords"].attrs.update(attributes)
    with pytest.raises(ValueError, match=said):
        read_slide(path, unit=unit, mpp=0.5 if unit == "um" else None)  # type: ignore[arg-type]
