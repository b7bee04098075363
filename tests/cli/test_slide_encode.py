"""``longnet slide-encode`` on small random weights."""

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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_slides import expected, slide, trident

from longnet.cli import entry
from longnet.cli.slide_encode import slide_encode
from longnet.gigapath import SlideEncoder
from longnet.training.progress import LineReporter

Longnet = Callable[..., "subprocess.CompletedProcess[str]"]


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
    assert again.returncode == 0 and "1 of 3 slides is done already" in again.stderr
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


def test_a_result_that_is_not_finite_is_not_written(weights: Path, tmp_path: Path, call: Longnet) -> None:
    """Numbers that a dtype cannot hold, say."""
    folder = tmp_path / "slides"
    slide(folder / "good.safetensors", 10)
    save_file({"features": torch.full((3, 1536), 1e38), "coords": torch.zeros(3, 2)}, folder / "huge.safetensors")
    result = call("slide-encode", folder, "--checkpoint", weights, "--device", "cpu")
    assert result.returncode == 1 and "huge.safetensors: the result in float32 is not finite" in result.stderr
    assert sorted(path.name for path in folder.glob("*.slide.*")) == ["good.slide.safetensors"]


def test_the_tile_size_is_that_of_each_slide(
    weights: Path, tmp_path: Path, call: Longnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, int] = {}

    def draw(path: Path, *_: torch.Tensor, tile_size: int, title: str) -> None:
        drawn[title] = tile_size
        path.write_bytes(b"")

    monkeypatch.setattr(sys.modules["longnet.slides.heatmap"], "heatmap", draw)
    folder = tmp_path / "slides"
    trident(folder / "x20.h5", 256, 1)
    trident(folder / "x40.h5", np.int64(512), 2)
    trident(folder / "x80.h5", 1024, 4)
    trident(folder / "unsaid.hdf5", None, 1)
    arguments = ("slide-encode", folder, "--checkpoint", weights, "--device", "cpu", "--heatmap")
    result = call(*arguments)
    assert result.returncode == 0, result.stderr
    names = ("x20", "x40", "x80", "unsaid")
    found = {name: folder / f"{name}.slide.safetensors" for name in names}
    held = load_file(slide(tmp_path / "s.safetensors", 40))
    with torch.no_grad():
        want = SlideEncoder.from_checkpoint(weights)(held["features"][None], held["coords"][None])[0][0]
    for path in found.values():
        torch.testing.assert_close(load_file(path)["embedding"], want)
    for name, size in zip(names, ("256", "512", "1024", "256"), strict=True):
        with safe_open(found[name], "pt") as file:
            assert file.metadata()["tile_size_used"] == size
        assert drawn[name] == int(size)
    assert "x40.h5: tiles of 512 pixels (patch_size_level0 of the slide)" in result.stderr
    assert "unsaid.hdf5: tiles of 256 pixels (the default: the slide does not say)" in result.stderr
    # The option wins, and makes another result.
    result = call(*arguments, "--tile-size", 256)
    assert "are done already" not in result.stderr
    assert "x40.h5: tiles of 256 pixels (--tile-size; the slide says 512)" in result.stderr
    torch.testing.assert_close(load_file(found["x20"])["embedding"], want)
    assert (load_file(found["x40"])["embedding"] - want).abs().max() > 1e-3
    assert "4 of 4 slides are done already" in call(*arguments, "--tile-size", 256).stderr


def test_the_segment_lengths_are_not_the_tile_size(weights: Path, tmp_path: Path, call: Longnet) -> None:
    # More tiles than the shortest segment.
    generator = torch.Generator().manual_seed(0)
    x, cell = torch.randn(1100, 1536, generator=generator), torch.arange(1100)
    held = {"features": x, "coords": torch.stack((cell // 40, cell % 40), 1) * 512}
    save_file(held, tmp_path / "s.safetensors")
    arguments = ("slide-encode", tmp_path / "s.safetensors", "--checkpoint", weights, "--device", "cpu")
    model = SlideEncoder.from_checkpoint(weights)
    other = SlideEncoder.from_checkpoint(weights, tile_size=512, max_wsi_size=16384)
    results = []
    for options, how in [((), model), (("--max-wsi-size", 16384), other)]:
        how.tile_size = 512
        result = call(*arguments, "--tile-size", 512, *options)
        assert result.returncode == 0, result.stderr
        results.append(load_file(tmp_path / "s.slide.safetensors")["embedding"])
        with torch.no_grad():
            torch.testing.assert_close(results[-1], how(held["features"][None], held["coords"][None])[0][0])
    assert not torch.allclose(*results)


def test_no_slide_ends_a_folder(weights: Path, tmp_path: Path, call: Longnet, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "slides"
    slide(folder / "z.safetensors", 10)
    slide(folder / "first.safetensors", 9)
    failures: dict[int, BaseException] = {
        2: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"),
        3: MemoryError(),
        4: RuntimeError("CUDA error: misaligned address"),
        5: AssertionError("a defect"),
    }
    for tiles in failures:
        slide(folder / f"m{tiles}.safetensors", tiles)
    with h5py.File(folder / "structured.h5", "w") as file:
        file["features"], file["coords"] = np.ones((2, 1536)), np.zeros(2, dtype=[("row", "i4"), ("y", "i4")])
    with h5py.File(folder / "text.H5", "w") as file:
        file["features"], file["coords"] = np.ones((2, 1536)), np.full((2, 2), b"256")
    with h5py.File(folder / "feats.h5", "w") as file:
        file["feats"], file["coords"] = np.ones((2, 1536)), np.zeros((2, 2))
    with h5py.File(folder / "broken.hdf5", "w") as file:
        file["features"], file["coords"] = h5py.SoftLink("/nowhere"), np.zeros((2, 2))
    (folder / "dangling.pt").symlink_to(tmp_path / "nowhere.pt")
    os.mkfifo(folder / "pipe.npz")
    forward = SlideEncoder.forward

    def fails(self: SlideEncoder, x: torch.Tensor, *rest: object, **options: object) -> list[torch.Tensor]:
        if x.shape[1] in failures:
            raise failures[x.shape[1]]
        return forward(self, x, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(SlideEncoder, "forward", fails)
    lines: list[tuple[float | None, str]] = []
    monkeypatch.setattr(LineReporter, "advance", lambda self, done, detail="": lines.append((done, detail)))
    arguments = ("slide-encode", folder, "--checkpoint", weights, "--device", "cpu")
    result = call(*arguments)
    assert result.returncode == 10 and "Traceback" not in result.stderr
    for name, reason in [
        ("m2.safetensors", "OutOfMemoryError: CUDA out of memory. Tried to allocate 3 GiB"),
        ("m3.safetensors", "MemoryError"),
        ("m4.safetensors", "RuntimeError: CUDA error: misaligned address"),
        ("m5.safetensors", "AssertionError: a defect"),
        ("structured.h5", "coords has dtype .* expected an array of real numbers"),
        ("text.H5", "coords has dtype .* expected an array of real numbers"),
        ("feats.h5", "the unit of coords is not known: its embeddings are called feats"),
        ("broken.hdf5", "features is a SoftLink"),
        ("dangling.pt", "No such file"),
        ("pipe.npz", "is not a file"),
    ]:
        assert re.search(rf"^.*{re.escape(name)}.*{reason}", result.stderr, flags=re.MULTILINE), (name, result.stderr)
    assert "10 of 12 slides could not be encoded: " in result.stderr
    assert sorted(path.name for path in folder.glob("*.slide.safetensors") if path.is_file()) == [
        "first.slide.safetensors",
        "z.slide.safetensors",
    ]
    # What failed is no progress, and the end is the end.
    shares = [done for done, _ in lines if done is not None]
    assert shares == sorted(shares) and shares[0] == 0.0 and shares[-1] == 1.0
    assert lines[-1][1].startswith("z.safetensors, 2 of 11 encoded, 9 failed")
    again = call(*arguments)
    assert again.returncode == 10 and "2 of 12 slides are done already" in again.stderr
    # Ctrl-C is no slide's failure.
    failures[3] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        slide_encode(folder, weights, device="cpu")


def test_without_h5py_the_command_says_what_to_install(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = trident(tmp_path / "s.h5", 256, 1)
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.setattr(sys, "argv", ["longnet", "slide-encode", str(source), "--checkpoint", str(weights)])
    with pytest.raises(SystemExit):
        entry.main()
    assert (
        "needs h5py, which is not installed. In a checkout of longnet: pip install '.[slides]'"
        in capsys.readouterr().err
    )


def test_what_is_no_slide_is_named(weights: Path, tmp_path: Path, call: Longnet) -> None:
    folder = tmp_path / "slides"
    slide(folder / "s.safetensors", 10)
    slide(folder / "t.slide.v2.safetensors", 10)
    (folder / "sub.h5").mkdir()
    for name in ("notes.csv", ".hidden", "._s.h5", "old.slide.safetensors", "s.slide.png"):
        (folder / name).write_bytes(b"")
    arguments = ("slide-encode", folder, "--checkpoint", weights, "--device", "cpu")
    for _ in range(2):
        result = call(*arguments)
        assert result.returncode == 0, result.stderr
        assert "Not encoded, not one of .pt, .npz, .safetensors, .h5, .hdf5: notes.csv\n" in result.stderr
        assert "Not encoded, hidden, as its name begins with a dot: ._s.h5, .hidden\n" in result.stderr
        assert "Not encoded, a result by its name: old.slide.safetensors\n" in result.stderr
    assert (folder / "t.slide.v2.slide.safetensors").is_file()
    for number in range(12):
        (folder / f"{number:02}.jpg").touch()
    assert ": 00.jpg, 01.jpg, 02.jpg, 03.jpg, 04.jpg, 05.jpg, 06.jpg, 07.jpg and 5 more\n" in call(*arguments).stderr
    (tmp_path / "outer" / "sub").mkdir(parents=True)
    (tmp_path / "outer" / "sub" / "a.csv").touch()
    result = call("slide-encode", tmp_path / "outer", "--checkpoint", weights)
    assert (
        "holds no slide" in result.stderr
        and "not one of .pt, .npz, .safetensors, .h5, .hdf5: sub/a.csv" in result.stderr
    )


def test_a_title_of_any_name(weights: Path, tmp_path: Path, call: Longnet) -> None:
    source = slide(tmp_path / r"a$\frac$.safetensors", 10)
    result = call("slide-encode", source, "--checkpoint", weights, "--device", "cpu", "--heatmap")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / r"a$\frac$.slide.png").is_file()


def test_a_refused_command_leaves_no_folder(weights: Path, tmp_path: Path, call: Longnet) -> None:
    source, out = slide(tmp_path / "slides" / "s.safetensors", 10), tmp_path / "new"
    for where in (source.parent, source):
        target = out if where.is_dir() else out / "x.safetensors"
        assert call("slide-encode", where, "-o", target, "--checkpoint", tmp_path / "no.pth").returncode == 2
        assert call("slide-encode", where, "-o", target, "--checkpoint", weights, "--arch", "huge").returncode == 2
    assert not out.exists()


def test_bad_arguments(weights: Path, tmp_path: Path, call: Longnet) -> None:
    source = slide(tmp_path / "slides" / "s.safetensors", 10)
    (tmp_path / "empty").mkdir()
    slide(tmp_path / "twice" / "s.safetensors", 10)
    (tmp_path / "twice" / "s.pt").write_bytes(b"")
    for arguments, said in [
        ((tmp_path / "none.pt",), "neither a file nor a folder"),
        ((tmp_path / "empty",), "holds no slide"),
        ((source, "-o", tmp_path / "x.pt"), "ending in .safetensors"),
        ((source, "-o", source), "is the slide itself"),
        ((source, "--dtype", "int8"), "--dtype int8 is unknown"),
        ((source, "--arch", "huge"), "arch='huge' is unknown"),
        ((source, "--device", "abacus"), "abacus"),
        ((source, "--tile-size", 0), "--tile-size 0: expected at least 1 pixel"),
        ((source, "--max-wsi-size", 100), "max_wsi_size=100"),
        ((source.parent, "-o", source), "is a file: expected a folder"),
    ]:
        result = call("slide-encode", *arguments, "--checkpoint", weights)
        assert result.returncode == 2 and said in result.stderr, (arguments, result.stderr)
    assert call("slide-encode", source, "--checkpoint", tmp_path / "no.pth").returncode == 2
