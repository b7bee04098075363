"""The ``longnet`` command and how its errors reach the user."""

from __future__ import annotations

import sys

import typer

from longnet.cli.generate import generate
from longnet.cli.inspect import inspect
from longnet.cli.slide_encode import slide_encode
from longnet.cli.stream import stream
from longnet.cli.train import train

app = typer.Typer(
    name="longnet",
    help="Dilated attention and LongNet: train, generate, stream, inspect a pattern, encode slides.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(train)
app.command()(generate)
app.command()(stream)
app.command()(inspect)
app.command()(slide_encode)


def run() -> None:
    """Run the command line; what a user can mend ends as one line on standard error and exit code 2.

    ``python -X dev -m longnet ...`` shows the traceback instead.
    """
    try:
        app()
    except (ValueError, TypeError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        _fail(error, 2)
    except RuntimeError as error:
        from longnet.training import TrainingDiverged
        from longnet.training.roll_call import LostProcess

        # Any other RuntimeError is a defect and keeps its traceback.
        if not isinstance(error, TrainingDiverged | LostProcess):
            raise
        _fail(error, 1)


def _fail(error: Exception, code: int) -> None:
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"longnet: error: {text}", file=sys.stderr)
    raise SystemExit(code)
