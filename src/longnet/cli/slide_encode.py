"""``longnet slide-encode``."""

from __future__ import annotations

import hashlib
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longnet.cli.stopping import INTERRUPTED, stop_on_signal

if TYPE_CHECKING:
    from longnet.gigapath import SlideEncoder

_DTYPES = ("float32", "float16", "bfloat16")


def slide_encode(
    slides: Annotated[
        Path, typer.Argument(help="Tile embeddings of a slide (.pt, .npz, .safetensors, .h5), or a folder of them.")
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
    tile_size: Annotated[int, typer.Option(help="Side of a tile, in pixels of the coordinates.")] = 256,
    max_wsi_size: Annotated[int, typer.Option(help="Side of the largest slide, in pixels.")] = 262144,
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
    mean over layers and heads, and coords. Files that are there already, from the same weights, settings and slide, are not
    made again: after a stop or a crash the same command goes on.
    """
    from longnet.gigapath import SlideEncoder
    from longnet.slides import is_made_from
    from longnet.training.progress import make_reporter
    from longnet.training.settings import resolve_device

    where = resolve_device(device, "float32")
    kind = dtype or ("float16" if where.type == "cuda" else "float32")
    if kind not in _DTYPES:
        raise ValueError(f"--dtype {kind} is unknown: expected one of {', '.join(_DTYPES)}")
    todo = _pairs(slides, out)
    settings = {
        "checkpoint": hashlib.sha256(checkpoint.read_bytes()).hexdigest(), "arch": arch, "tile_size": str(tile_size),
        "max_wsi_size": str(max_wsi_size), "global_pool": str(global_pool), "all_layers": str(all_layers), "dtype": kind,
        "heatmap": str(heatmap),
    }  # fmt: skip
    reporter = make_reporter(sys.stderr)
    left = [(source, target) for source, target in todo if not is_made_from(target, settings | _mark(source))]
    if len(left) < len(todo):
        reporter.say(f"{len(todo) - len(left)} of {len(todo)} slides are done already")
    failed: list[str] = []
    if left:
        model = SlideEncoder.from_checkpoint(
            checkpoint, arch, max_wsi_size=max_wsi_size, tile_size=tile_size, global_pool=global_pool, device=where
        )
        reporter.begin(f"{len(left)} slides", 0.0)
        with stop_on_signal(reporter.say, "this slide") as stopping:
            for number, (source, target) in enumerate(left, 1):
                try:
                    _encode(model, source, target, settings, kind, all_layers, heatmap)
                except ValueError as error:
                    failed.append(source.name)
                    reporter.say(f"{source}: {error}")
                reporter.advance(number / len(left), f"{source.name}, {number} of {len(left)}")
                if stopping.asked() and number < len(left):
                    reporter.say("Stopped. The same command goes on.")
                    raise typer.Exit(INTERRUPTED)
        reporter.end()
    if failed:
        raise ValueError(f"{len(failed)} of {len(todo)} slides could not be encoded: {', '.join(failed)}")
    print(f"{len(todo)} slides in {todo[0][1].parent}" if len(todo) > 1 else todo[0][1])


def _encode(
    model: SlideEncoder,
    source: Path,
    target: Path,
    settings: dict[str, str],
    kind: str,
    all_layers: bool,
    heatmap: bool,
) -> None:
    import torch

    from longnet.slides import heatmap as draw
    from longnet.slides import read_slide, result_bytes
    from longnet.training.files import write_atomically, write_bytes

    made_from = settings | _mark(source)
    slide, device = read_slide(source), model.cls_token.device
    x, coords = slide.embeddings[None].to(device), slide.coords[None].to(device)
    cast = nullcontext() if kind == "float32" else torch.autocast(device.type, getattr(torch, kind))
    with torch.inference_mode(), cast:
        found = torch.cat(model(x, coords, all_layer_embed=all_layers))
        tensors = {"layers": found} if all_layers else {"embedding": found[0]}
        if heatmap:
            tensors["attention"] = model.attention_weights(x, coords).mean((0, 2))[0]
            tensors["coords"] = slide.coords
    tensors = {name: tensor.float().cpu() for name, tensor in tensors.items()}
    if heatmap:

        def picture(path: Path) -> None:
            draw(path, tensors["attention"], slide.coords, tile_size=model.tile_size, title=source.stem)

        write_atomically(target.with_suffix(".png"), picture)
    # Last: where it is, all of the slide's files are.
    write_bytes(target, result_bytes(tensors, made_from))


def _pairs(slides: Path, out: Path | None) -> list[tuple[Path, Path]]:
    """(slide, where its result goes) of every slide."""
    from longnet.slides import SLIDE_FORMATS

    if slides.is_dir():
        found = sorted(
            path for path in slides.iterdir() if path.suffix in SLIDE_FORMATS and ".slide" not in path.suffixes
        )
        if not found:
            raise ValueError(f"{slides} holds no slide: expected files ending in {', '.join(SLIDE_FORMATS)}")
        stems = [path.stem for path in found]
        if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
            raise ValueError(f"{slides} holds several files named {', '.join(twice)}: expected one of each slide")
        folder = slides if out is None else out
        folder.mkdir(parents=True, exist_ok=True)
        return [(path, folder / f"{path.stem}.slide.safetensors") for path in found]
    if not slides.is_file():
        raise FileNotFoundError(f"{slides} is neither a file nor a folder")
    target = slides.with_name(f"{slides.stem}.slide.safetensors") if out is None else out
    if target.suffix != ".safetensors":
        raise ValueError(f"--out {target}: expected a name ending in .safetensors")
    if target.absolute() == slides.absolute():
        raise ValueError(f"--out {target} is the slide itself: expected another file")
    target.parent.mkdir(parents=True, exist_ok=True)
    return [(slides, target)]


def _mark(source: Path) -> dict[str, str]:
    """By which a slide that has changed is told."""
    state = source.stat()
    return {"slide_bytes": str(state.st_size), "slide_modified": str(state.st_mtime_ns)}
