"""``longnet choose-layers``."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from longnet.checks import check_int, check_ints
from longnet.cli.options import Options, one_data, path_option, read_path
from longnet.cli.start import conversion_of, settings_of, tokenizer_of
from longnet.training.settings import DTYPES

if TYPE_CHECKING:
    from torch import Tensor

    from longnet.training.choose import Candidate
    from longnet.training.data import Tokenizer
    from longnet.training.models import Config


def choose_layers(
    model: Annotated[
        Path,
        typer.Argument(
            help="What --init-from of longnet train takes: a run, a saved model, a checkpoint file, a Hugging Face folder.",
            metavar="MODEL",
            parser=read_path,
        ),
    ],
    data: Annotated[
        list[Path] | None,
        path_option(
            help="File or folder of text, or a folder of longnet prepare. Its held-out part is never read.",
            show_default="the run's, or Python's standard library source",
        ),
    ] = None,
    field: Annotated[
        str | None, typer.Option(help="Field of a row that is its text.", show_default="the run's, or text")
    ] = None,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Leave out rows without such a text.")] = False,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="bytes, a tokenizer.json, or a folder that holds one.", show_default="that of the model, or bytes"
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens (bytes without a tokenizer) per window of text.", show_default="as the run had"),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(help="Tokens that a layer with a window reads.", show_default="the model's own, or 512"),
    ] = None,
    full: Annotated[int, typer.Option(help="How many layers stay full at least.")] = 1,
    texts: Annotated[int, typer.Option(help="Windows of text, from the training part; always the same.")] = 16,
    batch: Annotated[int, typer.Option(help="Windows per forward pass.")] = 1,
    dtype: Annotated[
        str,
        typer.Option(
            help="Of the forward pass: float32, bfloat16, float16 (CUDA), or auto for the fastest of the first two."
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    json: Annotated[Path | None, path_option(help="File to write the same into, as JSON.")] = None,
) -> None:
    """Show which full attention layers of a trained model to leave full when the others get sliding windows.

    One layer after another gets a window: each time the one whose window raises the loss on the text least. The table says
    what each number of full layers costs at once, before any further training, and the command below it trains on.

    A model of L full layers takes about L x L / 2 passes over the text. The table goes to standard output, progress to standard
    error.
    """
    for name, value in (("--context", context), ("--window", window)):
        if value is not None:
            check_int(name, value, 1)
    check_ints(1, **{"--full": full, "--texts": texts, "--batch": batch})
    if dtype not in (*DTYPES, "auto"):
        raise ValueError(f"--dtype={dtype!r}: expected one of {(*DTYPES, 'auto')}")
    if (world := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(f"choose-layers in {world} processes of torchrun: expected one process, without torchrun")
    if json is not None:
        _check_new_file(json, model)
    path = one_data(data)
    given = {"data": None if path is None else str(path), "tokenizer": tokenizer, "field": field}
    options: Options = {"init_from": str(model), **{name: value for name, value in given.items() if value is not None}}
    if skip_bad_rows:
        options["skip_bad_rows"] = True
    start = _open(options, context, window, full)
    rows, unit = _measure(start, options, full, texts, batch, dtype, device)
    values = {"--init-from": model, "--layer-types": ",".join(rows[-1].layer_types), "--window": start.window}
    values |= {"--context": start.context, "--data": options.get("data"), "--field": options.get("field")}
    values |= {"--tokenizer": tokenizer, **conversion_of(str(model)), "--out": "RUN"}
    words = [str(word) for pair in values.items() if pair[1] is not None for word in pair]
    words += ["--skip-bad-rows"] * ("skip_bad_rows" in options)
    command = shlex.join(["longnet", "train", *words])
    Console().print(_table(rows, unit, start.window, start.context))
    print(f"\nTo train on with {_count(rows[-1])}:\n\n  {command}\n")
    print(
        "The first row is the model as it is. For another one change --layer-types alone: full_attention for the layers of its "
        "numbers, sliding_attention for those that got windows."
    )
    if json is not None:
        from longnet.training.files import write_json

        about = {"model": str(model), "data": options.get("data"), "texts": texts, "unit": unit}
        about |= {"context": start.context, "window": start.window}
        rows_written = [_describe(row, rows[0], unit) for row in rows]
        write_json(json.resolve(), {**about, "rows": rows_written, "command": command})


def _check_new_file(path: Path, model: Path) -> None:
    """Raise ValueError where a JSON file cannot be written, or would take the place of something else."""
    if not path.parent.is_dir() or (path.exists() and not path.is_file()):
        raise ValueError(f"--json {path}: expected a file in a folder that is there")
    if path.resolve().is_relative_to(model.resolve()):
        raise ValueError(f"--json {path} lies in the model's folder {model}: expected a file elsewhere")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--json {path}: expected a folder that may be written to")


@dataclass(frozen=True)
class _Start:
    """The trained model, and what its full layers get.

    Attributes:
        stored: its config as it was stored.
        config: the same for the text, with the types of all layers.
        read_weights: reads its weights.
        context, window: in tokens.
    """

    stored: Config
    config: Config
    read_weights: Callable[[], dict[str, Tensor]]
    context: int
    window: int


def _open(options: Options, context: int | None, window: int | None, full: int) -> _Start:
    """What does not fit is refused here, before the text is read."""
    from longnet.training.choose import windowed_config
    from longnet.training.initial import open_initial

    model = options["init_from"]
    with _naming_model():
        stored, read_weights = open_initial(model)
    run = settings_of(model)
    if "data" not in options and run.get("data") is not None:
        if not Path(run["data"]).exists():
            raise ValueError(f"MODEL {model} was trained on {run['data']}, which is not there: expected --data as well")
        defaults = {"data": run["data"], "field": run.get("field"), "skip_bad_rows": run.get("skip_bad_rows") or None}
        is_default = {"data": None, "field": "text", "skip_bad_rows": None}
        options |= {name: x for name, x in defaults.items() if x != is_default[name] and name not in options}
    if context is None and (context := run.get("context")) is None:
        raise ValueError(f"MODEL {model} is no run folder, which says its context: expected --context as well")
    config = _with_tokenizer(stored, tokenizer_of(options, "MODEL"), model)
    config = windowed_config(config, context, window, full)
    assert config.sliding_window is not None
    return _Start(stored, config, read_weights, context, config.sliding_window)


@contextmanager
def _naming_model() -> Iterator[None]:
    """Errors of ``init_from`` are of MODEL here."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("init_from", "MODEL")) from None


def _measure(
    start: _Start, options: Options, full: int, texts: int, batch: int, dtype: str, device: str
) -> tuple[list[Candidate], str]:
    """All candidates, and the unit of the losses that are shown."""
    import torch

    from longnet.training.choose import choose_layers as choose
    from longnet.training.data import check_lengths, read_corpus
    from longnet.training.device import choose_dtype, resolve_device
    from longnet.training.initial import check_fit, copy_weights
    from longnet.training.models import make_model
    from longnet.training.progress import make_reporter, task

    chosen = choose_dtype(device) if dtype == "auto" else dtype
    place, reporter = resolve_device(device, chosen), make_reporter(sys.stderr)
    of_rows = {name: options[name] for name in ("field", "skip_bad_rows") if name in options}
    corpus = read_corpus(options.get("data"), reporter.say, tokenizer=options.get("tokenizer", "bytes"), **of_rows)
    check_lengths(corpus, start.context)
    with _naming_model():
        weights = start.read_weights()
        check_fit(options["init_from"], start.stored, start.config, weights)
    model = make_model(start.config).to(place)
    copy_weights(weights, model)
    del weights
    unit = "bits per byte" if corpus.tokenizer.is_bytes else "nats per token"
    reporter.say(
        f"Text: {texts} window{'s' * (texts != 1)} of {start.context:,} training {corpus.unit}, on {place} in {chosen}. "
        f"Layers get windows of {start.window:,} {corpus.unit}"
    )

    def advance(done: float, total: int) -> None:
        reporter.advance(done / total, f"{int(done)} of {total} passes over the text")

    rows: list[Candidate] = []
    settings = {"window": start.window, "full": full, "texts": texts, "batch": batch, "dtype": getattr(torch, chosen)}
    with task(reporter, "Choosing layers"):
        for row in choose(model, corpus.train, start.context, on_progress=advance, **settings):
            rows.append(row)
            what = "The model as it is" if row.layer is None else f"Layer {row.layer} gets a window"
            added = "" if row.layer is None else f", {_in_unit(unit, row.loss - rows[0].loss):+.4f}"
            reporter.say(f"{what}: {_in_unit(unit, row.loss):.4f} {unit}{added}; {_count(row)}")
    return rows, unit


def _with_tokenizer(config: Config, tokenizer: Tokenizer | None, model: str) -> Config:
    """The config for the tokens of this tokenizer, bytes for None.

    Raises:
        ValueError: a model of other tokens.
    """
    from longnet.training.transformer_config import TransformerConfig

    rows = config.transformer["vocab_size"] if isinstance(config, TransformerConfig) else config.vocab_size
    if tokenizer is None and rows != 256:
        raise ValueError(f"MODEL {model} has {rows} tokens and holds no tokenizer.json: expected --tokenizer as well")
    size = 256 if tokenizer is None else tokenizer.vocab_size
    if isinstance(config, TransformerConfig):
        return config.replace(tokenizer_size=size)
    if size != rows:
        raise ValueError(
            f"MODEL {model} has {rows} tokens, and the tokenizer {size}: expected the one that it was trained with"
        )
    return config


def _in_unit(unit: str, nats: float) -> float:
    """Nats a token as bits a byte, where a token is a byte."""
    return nats / math.log(2) if unit.startswith("bits") else nats


def _count(row: Candidate) -> str:
    plural = "s" * (len(row.full_layers) != 1)
    return f"{len(row.full_layers)} full layer{plural} (layer{plural} {_numbers(row.full_layers)})"


def _numbers(layers: Sequence[int]) -> str:
    """``0-2, 5, 6`` for 0, 1, 2, 5, 6."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _describe(row: Candidate, first: Candidate, unit: str) -> dict[str, Any]:
    """A row as JSON holds it."""
    return {
        "layer": row.layer,
        "full_layers": row.full_layers,
        "layer_types": row.layer_types,
        "loss": _in_unit(unit, row.loss),
        "added": _in_unit(unit, row.loss - first.loss),
        "pair_share": row.pair_share,
    }


def _table(rows: Sequence[Candidate], unit: str, window: int, context: int) -> Table:
    table = Table(
        title=f"Windows of {window:,} at a context of {context:,}; layers count from 0",
        title_justify="left",
        title_style="bold",
    )
    for name in ("full layers", "their numbers", f"loss, {unit}", "added", "share of dense pairs"):
        table.add_column(name, justify="left" if name.startswith("their") else "right", overflow="fold")
    for row in rows:
        added = "" if row.layer is None else f"{_in_unit(unit, row.loss - rows[0].loss):+.4f}"
        cells = f"{_in_unit(unit, row.loss):.4f}", added, f"{row.pair_share:.2%}"
        table.add_row(str(len(row.full_layers)), _numbers(row.full_layers), *cells)
    return table
