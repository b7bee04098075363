"""``longnet slide-encode``."""

from __future__ import annotations

import hashlib
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longnet.cli.options import path_option
from longnet.cli.stopping import INTERRUPTED, stop_on_signal

if TYPE_CHECKING:
    from longnet.cli.slide_files import Job
    from longnet.gigapath import SlideEncoder
    from longnet.slides.files import Slide

_DTYPES = ("float32", "float16", "bfloat16")
_TILE_SIZE = 256
# The largest exit status that counts slides: shells use higher ones.
_MOST_FAILED = 100


def slide_encode(
    slides: Annotated[
        Path,
        typer.Argument(
            help="Tile embeddings of a slide (.pt, .npz, .safetensors, .h5, .hdf5), or a folder of them and of folders."
        ),
    ],
    checkpoint: Annotated[Path, typer.Option(help="Slide encoder's weights, .pth or .safetensors.")],
    out: Annotated[
        Path | None,
        path_option(
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
            show_default=f"what the slide says, else {_TILE_SIZE}",
        ),
    ] = None,
    unit: Annotated[
        str | None,
        typer.Option(
            help="Unit of the coordinates: pixels, um (microns) or tiles.",
            show_default="what the slide says or its numbers show, else it is refused",
        ),
    ] = None,
    mpp: Annotated[
        float | None, typer.Option(help="Microns of a pixel, for --unit um.", show_default="the slide's")
    ] = None,
    patients: Annotated[
        Path | None,
        typer.Option(
            help="CSV with PATIENT and FILENAME (in the folder): join a patient's slides along x.",
            show_default="a slide each",
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
    outputs: Annotated[
        str, typer.Option(help="Of embedding, class, mean, tiles (a row for each tile), layers; by commas.")
    ] = "embedding",
    all_layers: Annotated[bool, typer.Option("--all-layers", help="The same as --outputs layers.")] = False,
    heatmap: Annotated[bool, typer.Option("--heatmap", help="Also what the class token attends to, as PNG.")] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16, bfloat16 (autocast).", show_default="float16 on CUDA, else float32"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """Encode slides from the embeddings of their tiles, on a CPU or a GPU, into safetensors.

    A file holds each of --outputs by its name: embedding (dim), class (dim), mean (dim), tiles (tiles, dim), layers
    (layers + 1, dim); with tiles also coords, in pixels, and with --heatmap also attention (tiles), the mean over layers and
    heads, and coords. Files made from the same weights, settings and slide are not made again: after a stop or a crash the
    same command continues. A slide that fails is named with its reason and the others are encoded; the exit status is the
    number of those that failed, at most 100. Processes that encode one folder share its slides.
    """
    from longnet.cli.slide_files import find_jobs
    from longnet.gigapath import SlideEncoder
    from longnet.gigapath.architectures import segment_lengths
    from longnet.gigapath.checkpoint import named, read_checkpoint
    from longnet.gigapath.outputs import check_outputs
    from longnet.slides.files import is_made_from
    from longnet.slides.folders import counted, listed
    from longnet.slides.units import check_unit
    from longnet.training.device import resolve_device
    from longnet.training.lock import InUse, locked
    from longnet.training.progress import make_reporter

    where = resolve_device(device, "float32")
    kind = dtype or ("float16" if where.type == "cuda" else "float32")
    if kind not in _DTYPES:
        raise ValueError(f"--dtype {kind} is unknown: expected one of {', '.join(_DTYPES)}")
    if tile_size is not None and (tile_size < 1 or unit == "tiles"):
        raise ValueError(f"--tile-size {tile_size}: expected at least 1 pixel, and no --unit tiles")
    check_unit(unit, mpp)
    if all_layers and outputs != "embedding":
        raise ValueError(f"--all-layers with --outputs {outputs}: expected one of them")
    wanted = tuple(dict.fromkeys((outputs if not all_layers else "layers").split(",")))
    check_outputs(wanted)
    lengths = segment_lengths(max_wsi_size, tile_size or _TILE_SIZE)
    jobs, passed_over = find_jobs(slides, out, patients)
    settings = {
        "checkpoint": hashlib.sha256(checkpoint.read_bytes()).hexdigest(), "arch": arch, "tile_size": str(tile_size),
        "segment_lengths": str(lengths), "global_pool": str(global_pool), "outputs": ",".join(wanted), "dtype": kind,
        "heatmap": str(heatmap), "unit": str(unit), "mpp": str(mpp),
    }  # fmt: skip
    reporter = make_reporter(sys.stderr)
    for reason, names in passed_over.items():
        reporter.say(f"Not encoded, {reason}: {listed(names)}")
    failed: list[str] = []

    def fail(job: Job, error: Exception) -> None:
        failed.append(job.name)
        reporter.say(_describe_failure(job, error))

    pending = []
    for job in jobs:
        try:
            if not is_made_from(job.target, settings | job.version()):
                pending.append(job)
        except (OSError, ValueError) as error:
            fail(job, error)
    if done := len(jobs) - len(pending) - len(failed):
        reporter.say(f"{done} of {counted(len(jobs), 'slide')} {'is' if done == 1 else 'are'} done already")
    if pending:
        weights = read_checkpoint(checkpoint)
        for note in weights.notes:
            reporter.say(f"{checkpoint.name}: {note}")
        with named(checkpoint):
            model = SlideEncoder.from_checkpoint(
                weights.encoder,
                arch,
                max_wsi_size=max_wsi_size,
                tile_size=tile_size or _TILE_SIZE,
                global_pool=global_pool,
                device=where,
            )
        reporter.begin(counted(len(pending), "slide"), 0.0)
        encoded, reported, before, made, elsewhere = 0, "", len(failed), 0, []
        with stop_on_signal(reporter.say, "this slide") as stopping:
            for number, job in enumerate(pending, 1):
                try:
                    with locked(job.work_folder):
                        if is_made_from(job.target, settings | job.version()):
                            made += 1
                        else:
                            slide, model.tile_size, tiles = _read(job, tile_size, unit, mpp)
                            _encode(model, job, slide, settings | job.version(), kind, wanted, heatmap)
                            encoded += 1
                            if tiles != reported:
                                reporter.say(f"{job.name}: {tiles}")
                                reported = tiles
                except InUse:
                    elsewhere.append(job.name)
                except ModuleNotFoundError:
                    # Every HDF5 file would fail: the command says what to install.
                    raise
                except Exception as error:
                    # One file that fails, out of memory included, does not stop the others.
                    fail(job, error)
                wrong = len(failed) - before
                count = f"{encoded} of {len(pending)} encoded" + (f", {wrong} failed" if wrong else "")
                if by_others := made + len(elsewhere):
                    count += f", {by_others} by another process"
                reporter.advance((number - wrong) / max(1, len(pending) - wrong), f"{job.name}, {count}")
                if stopping.asked() and number < len(pending):
                    reporter.say("Stopped. Run the same command to continue.")
                    raise typer.Exit(INTERRUPTED)
        reporter.end()
        if elsewhere:
            reporter.say(f"Another process was encoding, and this one did not wait for: {listed(elsewhere)}")
    if failed:
        text = f"{len(failed)} of {counted(len(jobs), 'slide')} could not be encoded: {', '.join(failed)}"
        print(f"longnet: error: {text}", file=sys.stderr)
        raise typer.Exit(min(len(failed), _MOST_FAILED))
    print(f"{len(jobs)} slides in {out or slides}" if len(jobs) > 1 else jobs[0].target)


def _read(job: Job, option: int | None, unit: str | None, mpp: float | None) -> tuple[Slide, int, str]:
    """(the slide, of a patient all in one; pixels of a tile; the same in words with where they come from)."""
    from longnet.slides.files import read_slide
    from longnet.slides.patients import join_slides

    read = partial(read_slide, unit=unit, mpp=mpp)
    slides = [job.of_source(number, read) for number in range(len(job.sources))]
    size, tiles = _tile_size(option, slides[0])
    return (
        slides[0] if len(slides) == 1 else join_slides(slides, size, [str(source) for source in job.sources]),
        size,
        tiles,
    )


def _encode(
    model: SlideEncoder,
    job: Job,
    slide: Slide,
    made_from: dict[str, str],
    kind: str,
    outputs: Sequence[str],
    heatmap: bool,
) -> None:
    """Write the files of a slide."""
    import torch

    from longnet.gigapath import slide_outputs
    from longnet.slides.files import result_bytes
    from longnet.slides.heatmap import heatmap as draw
    from longnet.training.device import autocast
    from longnet.training.files import write_atomically, write_bytes

    if (channels := slide.embeddings.shape[1]) != model.in_dim:
        raise ValueError(f"embeddings of {channels:,} channels: the weights take {model.in_dim:,}")
    device = model.cls_token.device
    x, coords = slide.embeddings[None].to(device), slide.coords[None].to(device)
    with torch.inference_mode(), autocast(device, getattr(torch, kind)):
        if len(outputs) == 1 and outputs[0] in ("embedding", "layers"):
            # The last two layers compute the tokens that are read alone.
            states = torch.cat(model(x, coords, all_layer_embed=outputs[0] == "layers"))
            tensors = {outputs[0]: states if outputs[0] == "layers" else states[0]}
        else:
            tensors = {name: tensor[0] for name, tensor in slide_outputs(model, x, coords, outputs).items()}
        if heatmap:
            tensors["attention"] = model.attention_weights(x, coords).mean((0, 2))[0]
        if heatmap or "tiles" in outputs:
            tensors["coords"] = slide.coords
    tensors = {name: tensor.float().cpu() for name, tensor in tensors.items()}
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ValueError(f"the result in {kind} is not finite: expected other weights, or --dtype float32")
    job.target.parent.mkdir(parents=True, exist_ok=True)
    if heatmap:
        weights, side = tensors["attention"], model.tile_size
        write_atomically(
            job.target.with_suffix(".png"),
            lambda path: draw(path, weights, slide.coords, tile_size=side, title=Path(job.name).stem),
        )
    # Written last: where it exists, all files of the slide exist.
    write_bytes(job.target, result_bytes(tensors, made_from | {"tile_size_used": str(model.tile_size)}))


def _tile_size(option: int | None, slide: Slide) -> tuple[int, str]:
    """(pixels of a tile, the same in words with where they come from)."""
    if option is not None:
        others = "" if slide.tile_size in (None, option) else f"; the slide says {slide.tile_size}"
        return option, f"tiles of {option} pixels (--tile-size{others})"
    if slide.tile_size is not None:
        return slide.tile_size, f"tiles of {slide.tile_size} pixels ({slide.tile_size_from})"
    return _TILE_SIZE, f"tiles of {_TILE_SIZE} pixels (the default: the slide does not say)"


def _describe_failure(job: Job, error: Exception) -> str:
    """The slide and why it failed, in one line."""
    text = " ".join(str(error).split())
    if not isinstance(error, ValueError | OSError) or not text:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    text = text if text.startswith(str(job.sources[0])) and len(job.sources) == 1 else f"{job.name}: {text}"
    return f"{text}\n{traceback.format_exc()}" if sys.flags.dev_mode else text
