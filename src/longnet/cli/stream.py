"""``longnet stream``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from longnet.cli.stopping import INTERRUPTED, stop_on_signal


def stream(
    run: Annotated[Path, typer.Argument(help="Run folder of longnet train.", metavar="RUN")],
    data: Annotated[
        list[Path] | None,
        typer.Option(help="File or folder to read, - for standard input; several are read in the order given."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the record and the state.", show_default="RUN/stream")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Bytes to read at most.", show_default="all")] = None,
    chunk: Annotated[
        int | None, typer.Option(help="Bytes per forward pass.", show_default="65536 on CUDA, else 8192")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the forward pass and what it remembers: float32, bfloat16, or auto for bfloat16 on CUDA.",
            show_default="auto",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", show_default="auto")] = None,
    save_every: Annotated[
        float | None, typer.Option(help="Seconds between two saved states.", show_default="30")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the saved state; settings that you leave out stay the same.")
    ] = False,
) -> None:
    """Read any amount of bytes through a trained model in constant memory; report how well it predicts each one.

    The table of bits per byte by position goes to standard output, progress to standard error, and stream.jsonl in the
    --out folder gets a line a second. After a kill at any moment, the same command with --resume continues from the saved
    state and ends with the same bits per byte. Standard input must then be piped in again from its start.
    """
    from longnet.reading import StreamSettings, format_table, read_settings
    from longnet.reading import stream as read_stream
    from longnet.training.progress import make_reporter

    folder = run / "stream" if out is None else out
    # Absolute, so that a stream can be resumed from any working directory.
    paths = [str(path) if str(path) == "-" else str(path.absolute()) for path in data or ()]
    given: dict[str, Any] = {
        "run": str(run),
        "out": str(folder),
        "data": tuple(paths) or None,
        "tokens": tokens,
        "chunk": chunk,
        "dtype": dtype,
        "device": device,
        "save_every": save_every,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if resume:
        given = {**read_settings(folder).to_dict(), **given}
    elif not paths:
        raise ValueError(
            "expected data to read, as --data PATH (several times for several) or --data - for standard input"
        )
    reporter = make_reporter(sys.stderr)
    with stop_on_signal(reporter.say, "this chunk") as stopping:
        result = read_stream(
            StreamSettings(**given),
            resume=resume,
            reporter=reporter,
            should_stop=stopping.asked,
            waiting=stopping.waiting,
        )
    if not result.finished:
        where = f"longnet stream {run}{'' if out is None else f' --out {out}'} --resume"
        reporter.say(f"Stopped and saved after {result.position:,} bytes. To continue: {where}")
        raise typer.Exit(INTERRUPTED)
    print(format_table(result))
