"""``longnet train``."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longnet.cli.stopping import INTERRUPTED, stop_on_signal

if TYPE_CHECKING:
    from longnet.models import LongNetConfig
    from longnet.training import TrainSettings

DEFAULT_PRESET = "tiny"
DEFAULT_STEPS = 1000


def train(
    out: Annotated[Path, typer.Option(help="Run folder to make (or, with --resume, to continue).")],
    data: Annotated[
        Path | None,
        typer.Option(help="File or folder of text or any bytes.", show_default="Python's standard library source"),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Model preset: base, small, tiny or nano.", show_default=DEFAULT_PRESET)
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help='JSON or TOML file of LongNetConfig fields, and "preset" to start from one.'),
    ] = None,
    context: Annotated[int | None, typer.Option(help="Bytes per window.", show_default="8192")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps.", show_default=f"{DEFAULT_STEPS}, no limit with --minutes")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Stop training after this long (the report comes after).")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Windows per forward pass.", show_default="1")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Forward passes per step.", show_default="1")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.", show_default="0.001")] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps of linear warm-up.", show_default="50")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="cosine, linear, constant or wsd.", show_default="cosine")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="On matrices only.", show_default="0.1")] = None,
    clip: Annotated[float | None, typer.Option(help="Largest gradient norm, 0 for any.", show_default="1.0")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the forward pass: float32, bfloat16, float16 (CUDA), or auto for the fastest of the first two.",
            show_default="auto",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", show_default="auto")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, windows and dropout.", show_default="0")] = None,
    eval_every: Annotated[
        int | None, typer.Option(help="Steps between evaluations, 0 for none.", show_default="200")
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints, 0 for one at the end.", show_default="100")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads.", show_default="torch's choice, 1 for a small model")
    ] = None,
    cp: Annotated[
        int | None, typer.Option(help="Processes that share each window, of those torchrun started.", show_default="1")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out; settings that you leave out stay the same.")
    ] = False,
) -> None:
    """Train a byte-level LongNet and write a run folder: model, metrics, checkpoint, report.html.

    Needs no download: without --data it learns the source code of Python's standard library. After a kill at any
    moment, the same command with --resume continues from the last checkpoint, with the losses of a run that never stopped.

    Over several processes: torchrun --nproc-per-node 4 -m longnet train --cp 4 ... shares each window among four. Without
    --cp each process takes its own windows from the batch.
    """
    given = {
        "out": str(out),
        "data": None if data is None else str(data.absolute()),
        "context": context,
        "steps": steps,
        "minutes": minutes,
        "batch": batch,
        "accumulate": accumulate,
        "lr": lr,
        "warmup": warmup,
        "schedule": schedule,
        "weight_decay": weight_decay,
        "clip": clip,
        "dtype": dtype,
        "device": device,
        "seed": seed,
        "eval_every": eval_every,
        "save_every": save_every,
        "threads": threads,
        "cp": cp,
    }
    given = {name: value for name, value in given.items() if value is not None}
    settings = _make_settings(given, preset, config, resume)
    _run(settings, resume)


def _make_settings(given: dict[str, Any], preset: str | None, config: Path | None, resume: bool) -> TrainSettings:
    """Settings from the options; the rest comes from the run that is resumed, or from the defaults of a new one."""
    from longnet.models import LongNetConfig
    from longnet.training.folder import RunFolder
    from longnet.training.resume import read_settings
    from longnet.training.settings import TrainSettings, choose_dtype

    model = _read_model(preset, config)
    if given.get("dtype", "auto" if not resume else None) == "auto":
        given["dtype"] = choose_dtype(given.get("device", "auto"))
    if resume:
        saved = read_settings(RunFolder(given["out"]))
        return saved.replace(**given, **({} if model is None else {"model": model}))
    if "steps" not in given and "minutes" not in given:
        given["steps"] = DEFAULT_STEPS
    return TrainSettings(model=model or LongNetConfig.preset(DEFAULT_PRESET), **given)


def _read_model(preset: str | None, config: Path | None) -> LongNetConfig | None:
    """The model config that --preset or --config name; ``None`` for neither.

    Raises:
        ValueError: both, an unknown preset or field, a file that is neither JSON nor TOML.
    """
    from longnet.models import LongNetConfig

    if preset is not None and config is not None:
        raise ValueError('--preset and --config were both given: expected one (a config file may name a "preset")')
    if preset is not None:
        return LongNetConfig.preset(preset)
    if config is None:
        return None
    text = config.read_text(encoding="utf-8")
    try:
        values = tomllib.loads(text) if config.suffix.lower() == ".toml" else json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"--config {config} is not {'TOML' if config.suffix == '.toml' else 'JSON'}: {error}"
        ) from None
    if not isinstance(values, dict):
        raise ValueError(f"--config {config} holds a {type(values).__name__}: expected fields of LongNetConfig")
    base = values.pop("preset", None)
    return LongNetConfig.from_dict(values) if base is None else LongNetConfig.preset(base, **values)


def _run(settings: TrainSettings, resume: bool) -> None:
    from longnet.training import train as train_model
    from longnet.training import write_report
    from longnet.training.progress import SilentReporter, format_seconds, make_reporter
    from longnet.training.ranks import joined
    from longnet.training.report import long_context_verdict

    with joined(settings.cp, settings.device) as (ranks, device):
        reporter = make_reporter() if ranks.is_first else SilentReporter()
        settings = settings.replace(device=device)
        with stop_on_signal(reporter.say, "this step") as stopping:
            summary = train_model(settings, resume=resume, reporter=reporter, should_stop=stopping.asked, ranks=ranks)
    if not ranks.is_first:
        # The first process prints, writes and reports for all.
        raise typer.Exit(0 if summary.finished else INTERRUPTED)
    where = f"longnet train --out {settings.out} --resume"
    if not summary.finished:
        reporter.say(f"Stopped and saved after step {summary.step:,}. To continue: {where}")
        raise typer.Exit(INTERRUPTED)
    reporter.say(f"Trained {summary.step:,} steps on {summary.tokens:,} bytes in {format_seconds(summary.seconds)}")
    evaluation = write_report(settings.out, reporter=reporter)
    base = evaluation.baselines
    reporter.say(
        f"Held out: {evaluation.bits_per_byte.mean:.4f} bits per byte; "
        f"lzma {base.lzma:.4f}, unigram {base.unigram:.4f} on the same {evaluation.scored_bytes:,} bytes"
    )
    reporter.say(long_context_verdict(evaluation))
