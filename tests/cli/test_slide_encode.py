"""``longnet slide-encode`` on small random weights."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longnet.gigapath import SlideEncoder

Longnet = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("longnet.gigapath.encoder.ARCHITECTURES", {"gigapath_slide_enc12l768d": (2, 32)})
    torch.manual_seed(0)
    torch.save({"model": SlideEncoder(32, 2).upstream_state_dict()}, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


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


def test_one_slide(weights: Path, tmp_path: Path, call: Longnet) -> None:
    source = slide(tmp_path / "s.safetensors", 50)
    result = call("slide-encode", source, "--checkpoint", weights, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    torch.testing.assert_close(load_file(tmp_path / "s.slide.safetensors")["embedding"], expected(weights, source)[0])
    out = tmp_path / "new" / "x.safetensors"
    result = call(
        "slide-encode", source, "-o", out, "--checkpoint", weights, "--all-layers", "--heatmap", "--device", "cpu"
    )
    assert result.returncode == 0, result.stderr
    found = load_file(out)
    torch.testing.assert_close(found["layers"], expected(weights, source, True))
    assert found["attention"].shape == (50,) and 0 < float(found["attention"].sum()) < 1
    assert found["coords"].shape == (50, 2)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_goes_on_where_it_stopped(weights: Path, tmp_path: Path, call: Longnet) -> None:
    folder, out = tmp_path / "slides", tmp_path / "out"
    for number in (10, 20, 30):
        slide(folder / f"s{number}.safetensors", number)
    arguments = ("slide-encode", folder, "-o", out, "--checkpoint", weights, "--device", "cpu")
    assert call(*arguments).returncode == 0
    results = sorted(out.iterdir())
    assert [path.name for path in results] == [f"s{n}.slide.safetensors" for n in (10, 20, 30)]
    times = [path.stat().st_mtime_ns for path in results]
    # One is lost, one torn, as by a kill in a program that does not write atomically.
    results[0].unlink()
    results[1].write_bytes(results[1].read_bytes()[:100])
    again = call(*arguments)
    assert again.returncode == 0 and "1 of 3 slides are done already" in again.stderr
    assert results[2].stat().st_mtime_ns == times[2]
    for number, path in zip((10, 20, 30), results, strict=True):
        want = expected(weights, folder / f"s{number}.safetensors")[0]
        torch.testing.assert_close(load_file(path)["embedding"], want)
    # Another setting or another slide is made again.
    slide(folder / "s10.safetensors", 11)
    assert "2 of 3 slides are done already" in call(*arguments).stderr
    assert "are done already" not in call(*arguments, "--all-layers").stderr


def test_a_slide_that_fails_leaves_the_others(weights: Path, tmp_path: Path, call: Longnet) -> None:
    folder = tmp_path / "slides"
    slide(folder / "good.safetensors", 10)
    (folder / "bad.pt").write_bytes(b"no slide")
    save_file({"features": torch.randn(2, 1536), "coords": torch.full((2, 2), -5.0)}, folder / "far.safetensors")
    result = call("slide-encode", folder, "--checkpoint", weights, "--device", "cpu")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "2 of 3 slides could not be encoded: bad.pt, far.safetensors" in result.stderr
    assert "outside of the grid" in result.stderr
    assert sorted(path.name for path in folder.glob("*.slide.*")) == ["good.slide.safetensors"]


def test_bad_arguments(weights: Path, tmp_path: Path, call: Longnet) -> None:
    source = slide(tmp_path / "slides" / "s.safetensors", 10)
    (tmp_path / "empty").mkdir()
    slide(tmp_path / "twice" / "s.safetensors", 10)
    (tmp_path / "twice" / "s.pt").write_bytes(b"")
    for arguments, said in [
        ((tmp_path / "none.pt",), "neither a file nor a folder"),
        ((tmp_path / "empty",), "holds no slide"),
        ((tmp_path / "twice",), "several files named s"),
        ((source, "-o", tmp_path / "x.pt"), "ending in .safetensors"),
        ((source, "-o", source), "is the slide itself"),
        ((source, "--dtype", "int8"), "--dtype int8 is unknown"),
        ((source, "--arch", "huge"), "arch='huge' is unknown"),
        ((source, "--device", "abacus"), "abacus"),
    ]:
        result = call("slide-encode", *arguments, "--checkpoint", weights)
        assert result.returncode == 2 and said in result.stderr, (arguments, result.stderr)
    assert call("slide-encode", source, "--checkpoint", tmp_path / "no.pth").returncode == 2
