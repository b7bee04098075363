"""``longnet slide-encode`` on many slides, in the units and for the outputs of other tools."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_slides import expected, slide, trident

from longnet.cli.slide_encode import slide_encode
from longnet.gigapath import SlideEncoder
from longnet.training.lock import locked

SOURCE = Path(__file__).parents[2] / "src"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
Longnet = Callable[..., "subprocess.CompletedProcess[str]"]


def test_a_folder_of_200_slides(weights: Path, tmp_path: Path, call: Longnet, monkeypatch: pytest.MonkeyPatch) -> None:
    """In subfolders, 5 of them broken, each in another way, and stopped on the way."""
    folder, out = tmp_path / "slides", tmp_path / "out"
    for number in range(195):
        held = load_file(slide(tmp_path / "s.safetensors", 2 + number % 7))
        (folder / f"site{number % 3}" / "batch").mkdir(parents=True, exist_ok=True)
        with h5py.File(
            folder / f"site{number % 3}" / "batch" / f"s{number}.{('h5', 'H5', 'hdf5')[number % 3]}", "w"
        ) as file:
            file["features"], file["coords"] = held["features"].numpy(), held["coords"].numpy() * 2
            file["coords"].attrs["patch_size_level0"] = 512
    good = dict(sorted((path.stem, path) for path in folder.rglob("s*.*")))
    content = good["s0"].read_bytes()
    (folder / "site0" / "torn.h5").write_bytes(content[: len(content) // 2])
    x, coords = torch.randn(6, 1536), torch.arange(12).view(6, 2) * 256
    nan = x.clone()
    nan[2, 7] = torch.nan
    for name, held in {
        "channels": {"features": x[:, :1024].contiguous(), "coords": coords},
        "nan": {"features": nan, "coords": coords},
        "site1/counts": {"features": x, "coords": coords[:5]},
        "site2/half": {"features": x, "coords": (coords + 5000).half()},
    }.items():
        save_file(held, folder / f"{name}.safetensors")
    arguments = ("slide-encode", folder, "-o", out, "--checkpoint", weights, "--device", "cpu")
    forward, calls = SlideEncoder.forward, iter(range(10**6))

    def stops(self: SlideEncoder, *rest: object, **options: object) -> list[torch.Tensor]:
        if next(calls) == 100:
            raise KeyboardInterrupt
        return forward(self, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(SlideEncoder, "forward", stops)
    with pytest.raises(KeyboardInterrupt):
        slide_encode(folder, weights, out, device="cpu")
    done = len(list(out.rglob("*.slide.safetensors")))
    assert 95 <= done <= 100
    result = call(*arguments)
    assert f"{done} of 200 slides are done already" in result.stderr and result.returncode == 5
    for name, reason in [
        ("channels.safetensors", "embeddings of 1,024 channels: the weights take 1,536"),
        ("nan.safetensors", "not finite in 1 of 6 tiles, tile 2 the first"),
        ("site0/torn.h5", "cannot be read as .h5"),
        ("site1/counts.safetensors", r"expected \(L, C\) and \(L, 2\)"),
        ("site2/half.safetensors", "float16, which rounds pixels beyond 2,048"),
    ]:
        assert re.search(rf"^.*{re.escape(name)}.*{reason}", result.stderr, flags=re.MULTILINE), (name, result.stderr)
    assert "5 of 200 slides could not be encoded: channels.safetensors, nan.safetensors, site0/torn.h5" in result.stderr
    found = {path.name.removesuffix(".slide.safetensors"): path for path in out.rglob("*") if path.is_file()}
    assert set(found) == set(good)
    assert found["s4"] == out / "site1" / "batch" / "s4.slide.safetensors"
    torch.testing.assert_close(
        load_file(found["s4"])["embedding"], expected(weights, slide(tmp_path / "s.safetensors", 6))[0]
    )
    again = call(*arguments)
    assert again.returncode == 5 and "195 of 200 slides are done already" in again.stderr


def test_a_folder_that_cannot_be_read_is_named(
    weights: Path, tmp_path: Path, call: Longnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide(tmp_path / "slides" / "s.safetensors", 5)
    (tmp_path / "slides" / "locked").mkdir()
    scandir = os.scandir

    def refuses(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuses)
    result = call("slide-encode", tmp_path / "slides", "--checkpoint", weights, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert re.search(r"Not encoded, a folder that cannot be read \(Permission denied\): .*locked", result.stderr)


def test_outputs(weights: Path, tmp_path: Path, call: Longnet) -> None:
    source = slide(tmp_path / "s.safetensors", 30)
    arguments = ("slide-encode", source, "--checkpoint", weights, "--device", "cpu")
    assert call(*arguments, "--outputs", "tiles,mean,class,layers").returncode == 0
    found, held = load_file(tmp_path / "s.slide.safetensors"), load_file(source)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "class": (32,),
        "coords": (30, 2),
        "layers": (3, 32),
        "mean": (32,),
        "tiles": (30, 32),
    }
    torch.testing.assert_close(found["layers"], expected(weights, source, True), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["class"], expected(weights, source)[0], rtol=1e-5, atol=1e-5)
    pooled = SlideEncoder.from_checkpoint(weights, global_pool=True)
    with torch.no_grad():
        mean = pooled(held["features"][None], held["coords"][None])[0][0]
    torch.testing.assert_close(found["mean"], mean, rtol=1e-5, atol=1e-5)
    assert torch.equal(found["coords"], held["coords"].float())
    assert "done already" not in call(*arguments, "--outputs", "tiles").stderr
    for options, said in [
        (("--outputs", "patches"), "expected some of ('embedding',"),
        (("--outputs", "tiles", "--all-layers"), "expected one of them"),
    ]:
        result = call(*arguments, *options)
        assert result.returncode == 2 and said in result.stderr


def test_microns_of_stamp_are_the_same_tissue(weights: Path, tmp_path: Path, call: Longnet) -> None:
    held = load_file(slide(tmp_path / "s.safetensors", 40))
    cell, source = held["coords"] // 256, tmp_path / "stamp.h5"
    with h5py.File(source, "w") as file:
        file["feats"], file["coords"] = held["features"].numpy(), cell.float().numpy() * np.float32(256.0)
        file.attrs["unit"], file.attrs["tile_size_um"], file.attrs["tile_size_px"] = "um", 256.0, 224
    arguments = ("slide-encode", source, "--checkpoint", weights, "--device", "cpu", "--outputs", "embedding,tiles")
    result = call(*arguments)
    assert result.returncode == 0, result.stderr
    assert "tiles of 224 pixels (coordinates in um, 1.143 a pixel)" in result.stderr
    found = load_file(tmp_path / "stamp.slide.safetensors")
    assert torch.equal(found["coords"], cell.float() * 224)
    want = expected(weights, tmp_path / "s.safetensors")[0]
    torch.testing.assert_close(found["embedding"], want, rtol=1e-5, atol=1e-5)
    save_file({"features": held["features"], "coords": cell * 1.0}, tmp_path / "cells.safetensors")
    arguments = ("slide-encode", tmp_path / "cells.safetensors", "--checkpoint", weights, "--device", "cpu")
    refused = call(*arguments)
    assert (
        refused.returncode == 1 and "cells.safetensors: the unit of coords is not known: its 40 tiles" in refused.stderr
    )
    assert call(*arguments, "--unit", "tiles").returncode == 0
    torch.testing.assert_close(load_file(tmp_path / "cells.slide.safetensors")["embedding"], want)
    for options, said in [
        (("--unit", "feet"), "unit='feet' is unknown"),
        (("--mpp", "0.5"), "with unit='um' alone"),
        (("--unit", "tiles", "--tile-size", 512), "and no --unit tiles"),
    ]:
        result = call(*arguments, *options)
        assert result.returncode == 2 and said in result.stderr


def test_slides_of_a_patient_are_joined(weights: Path, tmp_path: Path, call: Longnet) -> None:
    folder, table = tmp_path / "slides", tmp_path / "table.csv"
    for name, scale, tiles in [("a", 2, 20), ("b", 2, 30), ("c", 1, 10), ("e", 2, 20), ("f", 1, 10)]:
        trident(folder / f"{name}.h5", 256 * scale, scale, tiles)
    table.write_text(
        "PATIENT,FILENAME,SITE\nP2,a.h5 ,x\n P1,c.h5,y\nP2,b.h5,x\nmixed,e.h5,x\nmixed,f.h5,x\nlost,d.h5,z\n"
    )
    arguments = (
        "slide-encode",
        folder,
        "-o",
        tmp_path / "out",
        "--patients",
        table,
        "--checkpoint",
        weights,
        "--device",
        "cpu",
    )
    result = call(*arguments)
    assert result.returncode == 2 and "2 of 4 slides could not be encoded: lost, mixed" in result.stderr
    assert re.search(r"mixed: .*f\.h5 has tiles of 256 pixels: expected 512 .*e\.h5 says 512", result.stderr)
    assert re.search(r"lost: .*table\.csv, line 7: .*d\.h5: No such file", result.stderr)
    one, two = (load_file(slide(tmp_path / "s" / f"{n}.safetensors", n)) for n in (20, 30))
    right = torch.tensor([int(one["coords"][:, 0].max()) + 256, 0])
    save_file(
        {
            "features": torch.cat((one["features"], two["features"])),
            "coords": torch.cat((one["coords"], two["coords"] + right)),
        },
        tmp_path / "both.safetensors",
    )
    found = {path.name: load_file(path)["embedding"] for path in (tmp_path / "out").iterdir()}
    assert set(found) == {"P1.slide.safetensors", "P2.slide.safetensors"}
    torch.testing.assert_close(found["P2.slide.safetensors"], expected(weights, tmp_path / "both.safetensors")[0])
    assert "2 of 4 slides are done already" in call(*arguments).stderr
    for text, said in [
        ("A,B\n1,2\n", "has the columns ['A', 'B']: expected ('PATIENT', 'FILENAME')"),
        ("PATIENT,FILENAME\n", "has no row"),
        ("PATIENT,FILENAME\n../x,a.h5\n", "line 2: the patient is '../x': expected a name without a slash"),
        ("PATIENT,FILENAME\nx,a.h5\nx,a.h5\n", "line 3: 'a.h5' is on line 2 already: expected each slide once"),
        ("PATIENT,FILENAME\nx,a.h5\ny,./a.h5\n", "line 3: './a.h5' is on line 2 already"),
        ("PATIENT,FILENAME\nx, \n", "line 2, column 'FILENAME' is ''"),
    ]:
        table.write_text(text)
        result = call(*arguments)
        assert result.returncode == 2 and said in result.stderr
    (folder / "torn.h5").write_bytes(b"torn")
    table.write_text("PATIENT,FILENAME\nx,torn.h5\n")
    assert re.search(r"x: .*table\.csv, line 2: .*torn\.h5 cannot be read as \.h5", call(*arguments).stderr)
    assert "expected the folder" in call("slide-encode", folder / "a.h5", *arguments[4:]).stderr


def test_slides_of_other_microns_a_pixel_are_not_joined(weights: Path, tmp_path: Path, call: Longnet) -> None:
    folder, table = tmp_path / "slides", tmp_path / "table.csv"
    folder.mkdir()
    for name, side in [("a", 256.0), ("b", 112.0)]:
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["feats"], file["coords"] = np.ones((4, 1536), np.float32), np.arange(8.0).reshape(4, 2) * side
            file.attrs["unit"], file.attrs["tile_size_um"], file.attrs["tile_size_px"] = "um", side, 224
    table.write_text("PATIENT,FILENAME\np,a.h5\np,b.h5\n")
    arguments = ("slide-encode", folder, "--patients", table, "--checkpoint", weights, "--device", "cpu")
    result = call(*arguments)
    assert result.returncode == 1 and not (folder / "p.slide.safetensors").exists()
    assert re.search(r"p: .*b\.h5 has 0\.5 microns a pixel and .*a\.h5 1\.143: expected the same", result.stderr)
    table.write_text("PATIENT,FILENAME\np,a.h5\nq,b.h5\n")
    assert call(*arguments).returncode == 0


def test_the_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Torch is imported when the command imports it, not before, and the published architecture is as large as it is."""
    made, weights = tmp_path / "s.safetensors", tmp_path / "weights.pth"
    save_file({"features": torch.randn(3, 16), "coords": torch.tensor([[0, 0], [256, 0], [0, 512]])}, made)
    torch.save(SlideEncoder(384, 12, in_dim=16).upstream_state_dict(), weights)
    arguments = (
        "slide-encode",
        made,
        "--checkpoint",
        weights,
        "--arch",
        "gigapath_slide_enc12l384d",
        "--device",
        "cpu",
    )
    done = subprocess.run(
        [sys.executable, "-m", "longnet", *map(str, arguments)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert load_file(tmp_path / "s.slide.safetensors")["embedding"].shape == (384,)


def test_two_files_of_one_name_fail_alone(weights: Path, tmp_path: Path, call: Longnet) -> None:
    folder = tmp_path / "slides"
    slide(folder / "good.safetensors", 5)
    slide(folder / "twice.safetensors", 5)
    (folder / "twice.pt").write_bytes(b"")
    result = call("slide-encode", folder, "--checkpoint", weights, "--device", "cpu")
    assert result.returncode == 1
    assert "twice.pt, " in result.stderr and "several files of one slide's name; expected one of them" in result.stderr
    assert [path.name for path in folder.glob("*.slide.*")] == ["good.slide.safetensors"]


def test_processes_share_the_slides_of_a_folder(
    weights: Path, tmp_path: Path, call: Longnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "slides"
    for name in "abc":
        slide(folder / f"{name}.safetensors", 5)
    arguments = ("slide-encode", folder, "--checkpoint", weights, "--device", "cpu")
    # Another process is at work on the first, and makes the second before it is its turn here.
    other = locked(folder / "a.slide.safetensors.working")
    other.__enter__()
    forward, inside = SlideEncoder.forward, []

    def meanwhile(self: SlideEncoder, *rest: object, **options: object) -> list[torch.Tensor]:
        if not inside:
            inside.append(1)
            slide_encode(folder, weights, device="cpu")
        return forward(self, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(SlideEncoder, "forward", meanwhile)
    result = call(*arguments)
    assert result.returncode == 0, result.stderr
    # The call inside has found a and b taken, and has made c.
    assert "Another process was encoding, and this one did not wait for: a.safetensors, b.safetensors" in result.stderr
    assert "1 of 3 encoded, 2 by another process" in result.stderr
    assert {path.name for path in folder.glob("*.slide.*")} >= {"b.slide.safetensors", "c.slide.safetensors"}
    assert not (folder / "a.slide.safetensors").exists()
    again = call(*arguments)
    assert "2 of 3 slides are done already" in again.stderr and "Not encoded" not in again.stderr
    other.__exit__(None, None, None)
    last = call(*arguments)
    assert last.returncode == 0 and (folder / "a.slide.safetensors").exists()
    assert not list(folder.glob("*.working"))
