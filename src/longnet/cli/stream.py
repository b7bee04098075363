"""``longnet stream``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from longnet.cli.options import Options, options_of, path_option
from longnet.cli.stopping import INTERRUPTED, stop_on_signal
from longnet.reading.settings import StreamSettings


@options_of(StreamSettings)
def stream(
    run: Annotated[Path, typer.Argument(help="Run folder of longnet train.", metavar="RUN")],
    data: Annotated[
        list[Path] | None,
        typer.Option(help="File or folder to read, - for standard input; several are read in the order given."),
    ] = None,
    out: Annotated[
        Path | None, path_option(help="Folder for the record and the state.", show_default="RUN/stream")
    ] = None,
    *,
    options: Options,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the saved state; settings that you leave out stay the same.")
    ] = False,
) -> None:
    """Read any amount of bytes through a trained model; report how well it predicts each one.

    Memory stays as it is with LongNet's pattern and windows; full and strided layers keep their keys of all that is read.

    The table of bits per byte by position goes to standard output, progress to standard error, and stream.jsonl in the
    --out folder gets a line a second. After a kill at any moment, the same command with --resume continues from the saved
    state and ends with the same bits per byte. Standard input must then be piped in again from its start.
    """
    from longnet.reading.folder import read_settings
    from longnet.reading.loop import stream as read_stream
    from longnet.reading.table import format_table
    from longnet.training.progress import make_reporter

    folder = run / "stream" if out is None else out
    # Absolute, so that a stream can be resumed from any working directory.
    paths = [str(path) if str(path) == "-" else str(path.absolute()) for path in data or ()]
    options |= {"run": str(run), "out": str(folder)}
    if paths:
        options["data"] = tuple(paths)
    if resume:
        options = {**read_settings(folder).to_dict(), **options}
    elif not paths:
        raise ValueError(
            "expected data to read, as --data PATH (several times for several) or --data - for standard input"
        )
    reporter = make_reporter(sys.stderr)
    with stop_on_signal(reporter.say, "this chunk") as stopping:
        result = read_stream(
            StreamSettings(**options),
            resume=resume,
            reporter=reporter,
            should_stop=stopping.asked,
            waiting=stopping.waiting,
        )
    if not result.finished:
        given = [] if out is None else ["--out", str(out)]
        where = shlex.join(["longnet", "stream", str(run), *given, "--resume"])
        reporter.say(f"Stopped and saved after {result.position:,} bytes. To continue: {where}")
        raise typer.Exit(INTERRUPTED)
    print(format_table(result))
