"""``longnet slide-encode``."""

from __future__ import annotations

import hashlib
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longnet.cli.stopping import INTERRUPTED, stop_on_signal

if TYPE_CHECKING:
    from longnet.gigapath import SlideEncoder

_DTYPES = ("float32", "float16", "bfloat16")
_TILE_SIZE = 256
_RESULTS = (".slide.safetensors", ".slide.png")


def slide_encode(
    slides: Annotated[
        Path,
        typer.Argument(help="Tile embeddings of a slide (.pt, .npz, .safetensors, .h5, .hdf5), or a folder of them."),
    ],
    checkpoint: Annotated[Path, typer.Option(help="Slide encoder's weights, .pth or .safetensors.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="File, or for a folder of slides a folder.",
            show_default="NAME.slide.safetensors beside it",
        ),
    ] = None,
    arch: Annotated[str, typer.Option(help="Architecture of the weights.")] = "gigapath_slide_enc12l768d",
    tile_size: Annotated[
        int | None,
        typer.Option(
            help="Side of a tile, in pixels of the coordinates.",
            show_default=f"patch_size_level0 of the slide's coords, else {_TILE_SIZE}",
        ),
    ] = None,
    max_wsi_size: Annotated[
        int | None,
        typer.Option(
            help="Side of the largest slide, in pixels: with --tile-size it decides the segment lengths.",
            show_default="1,024 tiles, as in the published weights",
        ),
    ] = None,
    global_pool: Annotated[bool, typer.Option("--global-pool", help="Mean of the tiles, not the class token.")] = False,
    all_layers: Annotated[bool, typer.Option("--all-layers", help="Read every layer out, not only the last.")] = False,
    heatmap: Annotated[bool, typer.Option("--heatmap", help="Also what the class token attends to, as PNG.")] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16, bfloat16 (autocast).", show_default="float16 on CUDA, else float32"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """Encode slides from the embeddings of their tiles, on a CPU or a GPU, into safetensors.

    A file holds embedding (dim), or layers (layers + 1, dim) with --all-layers; with --heatmap also attention (tiles), the
    mean over layers and heads, and coords. Files made from the same weights, settings and slide are not made again: after a
    stop or a crash the same command continues. A slide that fails is named with its reason, the others are encoded, and the
    exit status is 2.
    """
    from longnet.gigapath import SlideEncoder
    from longnet.gigapath.architectures import segment_lengths
    from longnet.slides import is_made_from
    from longnet.training.device import resolve_device
    from longnet.training.progress import make_reporter

    where = resolve_device(device, "float32")
    kind = dtype or ("float16" if where.type == "cuda" else "float32")
    if kind not in _DTYPES:
        raise ValueError(f"--dtype {kind} is unknown: expected one of {', '.join(_DTYPES)}")
    if tile_size is not None and tile_size < 1:
        raise ValueError(f"--tile-size {tile_size}: expected at least 1 pixel")
    lengths = segment_lengths(max_wsi_size, tile_size or _TILE_SIZE)
    todo, passed_over = _find_slides(slides, out)
    settings = {
        "checkpoint": hashlib.sha256(checkpoint.read_bytes()).hexdigest(), "arch": arch, "tile_size": str(tile_size),
        "segment_lengths": str(lengths), "global_pool": str(global_pool), "all_layers": str(all_layers), "dtype": kind,
        "heatmap": str(heatmap),
    }  # fmt: skip
    reporter = make_reporter(sys.stderr)
    for reason, names in passed_over.items():
        reporter.say(f"Not encoded, {reason}: {', '.join(names)}")
    failed: list[str] = []

    def fail(source: Path, error: Exception) -> None:
        failed.append(source.name)
        reporter.say(_describe_failure(source, error))

    pending = []
    for source, target in todo:
        try:
            if not is_made_from(target, settings | _slide_version(source)):
                pending.append((source, target))
        except OSError as error:
            fail(source, error)
    if done := len(todo) - len(pending) - len(failed):
        reporter.say(f"{done} of {len(todo)} slides are done already")
    if pending:
        model = SlideEncoder.from_checkpoint(
            checkpoint,
            arch,
            max_wsi_size=max_wsi_size,
            tile_size=tile_size or _TILE_SIZE,
            global_pool=global_pool,
            device=where,
        )
        pending[0][1].parent.mkdir(parents=True, exist_ok=True)
        reporter.begin(f"{len(pending)} slides", 0.0)
        encoded, reported, before = 0, "", len(failed)
        with stop_on_signal(reporter.say, "this slide") as stopping:
            for number, (source, target) in enumerate(pending, 1):
                try:
                    made_from = settings | _slide_version(source)
                    tiles = _encode(model, source, target, made_from, tile_size, kind, all_layers, heatmap)
                    encoded += 1
                    if tiles != reported:
                        reporter.say(f"{source.name}: {tiles}")
                        reported = tiles
                except ModuleNotFoundError:
                    # Every HDF5 file would fail: the command says what to install.
                    raise
                except Exception as error:
                    # One file that fails, out of memory included, does not stop the others.
                    fail(source, error)
                wrong = len(failed) - before
                count = f"{encoded} of {len(pending)} encoded" + (f", {wrong} failed" if wrong else "")
                reporter.advance(encoded / max(1, len(pending) - wrong), f"{source.name}, {count}")
                if stopping.asked() and number < len(pending):
                    reporter.say("Stopped. Run the same command to continue.")
                    raise typer.Exit(INTERRUPTED)
        reporter.end()
    if failed:
        raise ValueError(f"{len(failed)} of {len(todo)} slides could not be encoded: {', '.join(failed)}")
    print(f"{len(todo)} slides in {todo[0][1].parent}" if len(todo) > 1 else todo[0][1])


def _encode(
    model: SlideEncoder,
    source: Path,
    target: Path,
    made_from: dict[str, str],
    tile_size: int | None,
    kind: str,
    all_layers: bool,
    heatmap: bool,
) -> str:
    """Write the files of a slide; return its tile size and where that comes from, in words."""
    import torch

    from longnet.slides import heatmap as draw
    from longnet.slides import read_slide, result_bytes
    from longnet.training.device import autocast
    from longnet.training.files import write_atomically, write_bytes

    slide, device = read_slide(source), model.cls_token.device
    model.tile_size, tiles = _tile_size(tile_size, slide.tile_size)
    x, coords = slide.embeddings[None].to(device), slide.coords[None].to(device)
    with torch.inference_mode(), autocast(device, getattr(torch, kind)):
        layers = torch.cat(model(x, coords, all_layer_embed=all_layers))
        tensors = {"layers": layers} if all_layers else {"embedding": layers[0]}
        if heatmap:
            tensors["attention"] = model.attention_weights(x, coords).mean((0, 2))[0]
            tensors["coords"] = slide.coords
    tensors = {name: tensor.float().cpu() for name, tensor in tensors.items()}
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ValueError(f"{source}: the result in {kind} is not finite: expected other weights, or --dtype float32")
    if heatmap:
        weights, side = tensors["attention"], model.tile_size
        write_atomically(
            target.with_suffix(".png"),
            lambda path: draw(path, weights, slide.coords, tile_size=side, title=source.stem),
        )
    # Written last: where it exists, all files of the slide exist.
    write_bytes(target, result_bytes(tensors, made_from | {"tile_size_used": str(model.tile_size)}))
    return tiles


def _tile_size(option: int | None, of_the_slide: int | None) -> tuple[int, str]:
    """(pixels of a tile, the same in words with where they come from)."""
    if option is not None:
        others = "" if of_the_slide in (None, option) else f"; the slide says {of_the_slide}"
        return option, f"tiles of {option} pixels (--tile-size{others})"
    if of_the_slide is not None:
        return of_the_slide, f"tiles of {of_the_slide} pixels (patch_size_level0 of the slide)"
    return _TILE_SIZE, f"tiles of {_TILE_SIZE} pixels (the default: the slide does not say)"


def _describe_failure(source: Path, error: Exception) -> str:
    """The slide and why it failed, in one line."""
    text = " ".join(str(error).split())
    if not isinstance(error, ValueError | OSError) or not text:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    text = text if text.startswith(str(source)) else f"{source}: {text}"
    return f"{text}\n{traceback.format_exc()}" if sys.flags.dev_mode else text


def _find_slides(slides: Path, out: Path | None) -> tuple[list[tuple[Path, Path]], dict[str, list[str]]]:
    """(slide, its target) of every slide, and the names of other entries by the reason why they are not encoded."""
    from longnet.slides import SLIDE_FORMATS

    if slides.is_dir():
        entries = sorted(slides.iterdir())
        paths = [path for path in entries if not _skip_reason(path)]
        stems = [path.stem for path in paths]
        own = {f"{stem}{ending}" for stem in stems for ending in _RESULTS}
        passed_over: dict[str, list[str]] = {}
        for path in entries:
            if path.name not in own and (reason := _skip_reason(path)):
                passed_over.setdefault(reason, []).append(path.name)
        if not paths:
            others = "".join(f"; {reason}: {', '.join(names)}" for reason, names in passed_over.items())
            raise ValueError(f"{slides} holds no slide: expected files ending in {', '.join(SLIDE_FORMATS)}{others}")
        if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
            raise ValueError(f"{slides} holds several files named {', '.join(twice)}: expected one of each slide")
        folder = slides if out is None else out
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out {folder} is a file: expected a folder, as {slides} is one")
        return [(path, folder / f"{path.stem}.slide.safetensors") for path in paths], passed_over
    if not slides.is_file():
        raise FileNotFoundError(f"{slides} is neither a file nor a folder")
    target = slides.with_name(f"{slides.stem}.slide.safetensors") if out is None else out
    if target.suffix != ".safetensors":
        raise ValueError(f"--out {target}: expected a name ending in .safetensors")
    if target.absolute() == slides.absolute():
        raise ValueError(f"--out {target} is the slide itself: expected another file")
    return [(slides, target)], {}


def _skip_reason(path: Path) -> str:
    """Why an entry of a folder is not encoded; empty for a slide."""
    from longnet.slides import SLIDE_FORMATS

    if path.is_dir():
        return "a folder, which has to be named by itself"
    if path.name.endswith(_RESULTS):
        return "a result by its name"
    return "" if path.suffix.lower() in SLIDE_FORMATS else f"not one of {', '.join(SLIDE_FORMATS)}"


def _slide_version(source: Path) -> dict[str, str]:
    """Size and modification time, which tell whether a slide has changed."""
    state = source.stat()
    return {"slide_bytes": str(state.st_size), "slide_modified": str(state.st_mtime_ns)}
