"""The ``longnet`` command and how its errors reach the user."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Annotated

import typer

from longnet import __version__
from longnet.cli.choose_layers import choose_layers
from longnet.cli.generate import generate
from longnet.cli.inspect import inspect
from longnet.cli.once import error_text, say_once
from longnet.cli.prepare import prepare, tokenizers
from longnet.cli.slide_encode import slide_encode
from longnet.cli.slide_finetune import slide_finetune
from longnet.cli.stream import stream
from longnet.cli.train import train

app = typer.Typer(
    name="longnet",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# Short enough for one line of a terminal of 80 columns.
app.command(short_help="Train a model on any files; write a folder with a report.")(train)
app.command(short_help="Turn text into tokens, once for many runs.")(prepare)
app.add_typer(tokenizers, name="tokenizer", short_help="Train a tokenizer.")
app.command(short_help="Show which full layers of a model need no window.")(choose_layers)
app.command(short_help="Continue a prompt with a trained model.")(generate)
app.command(short_help="Read any amount of bytes; report bits per byte.")(stream)
app.command(short_help="Show what a pattern costs, covers and sees; draw it.")(inspect)
app.command(short_help="Encode pathology slides with Prov-GigaPath's weights.")(slide_encode)
app.command(short_help="Fine-tune a slide encoder on a cohort; write a report.")(slide_finetune)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"longnet {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Dilated attention and LongNet: train, generate, stream, inspect a pattern, encode slides."""


def run() -> None:
    """Run the command line; an error that the user can correct is one line on standard error and exit code 2.

    ``python -X dev -m longnet ...`` shows the traceback instead.
    """
    try:
        app()
    except (ValueError, TypeError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        _fail(error, 2)
    except MemoryError as error:
        _fail(MemoryError(f"not enough memory: {error}" if str(error) else "not enough memory"), 2)
    except RuntimeError as error:
        from longnet.training.liveness import LostProcess
        from longnet.training.trainer import TrainingDiverged

        if isinstance(error, LostProcess):
            # One process alone raises it. It has no time to hear what the first one says, which may be the lost one.
            _fail(error, 1, partial(print, file=sys.stderr, flush=True))
        # Any other RuntimeError is a defect and keeps its traceback.
        if not isinstance(error, TrainingDiverged):
            raise
        _fail(error, 1)


def _fail(error: Exception, code: int, say: Callable[[str], None] = say_once) -> None:
    say(f"longnet: error: {error_text(error)}")
    raise SystemExit(code)
