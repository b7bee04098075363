"""``longnet train``."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longnet.cli.model_config import read_config
from longnet.cli.options import Options, one_data, options_of, path_option
from longnet.cli.start import tokenizer_of
from longnet.cli.stopping import INTERRUPTED, stop_on_signal
from longnet.training.settings import DEFAULT_STEPS, TrainSettings
from longnet.training.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from longnet.models import LongNetConfig
    from longnet.training.models import Config

DEFAULT_PRESET = "tiny"


@options_of(TrainSettings)
def train(
    out: Annotated[
        Path,
        path_option(help="Run folder to make (or, with --resume, to continue)."),
    ],
    data: Annotated[
        list[Path] | None,
        path_option(
            help="File or folder of text or any bytes, or a folder of longnet prepare.",
            show_default="Python's standard library source",
        ),
    ] = None,
    init_from: Annotated[
        Path | None,
        path_option(
            help="Begin with the weights and the model of a run, a saved model, a checkpoint file or a Hugging Face folder.",
            show_default="random weights",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Model preset: base, small, tiny or nano.",
            show_default=f"{DEFAULT_PRESET}, or the model of --init-from",
        ),
    ] = None,
    stack: Annotated[
        str | None,
        typer.Option(
            help="What the layers read: balanced, light or longnet (the paper's pattern).",
            show_default="balanced, longnet for nano, or as in --init-from",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        path_option(help='JSON or TOML file of LongNetConfig fields, and "preset" and "stack" to start from.'),
    ] = None,
    layer_types: Annotated[
        str | None, typer.Option(help="What each layer computes, repeated: sliding_attention,strided_attention.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens of the window of sliding and strided layers.")] = None,
    stride: Annotated[int | None, typer.Option(help="Strided layers read every so-many-th block.")] = None,
    stride_block: Annotated[int | None, typer.Option(help="Tokens of such a block.")] = None,
    shift_keys: Annotated[
        bool | None,
        typer.Option("--shift-keys/--no-shift-keys", help="Keys of strided and full layers hold the token before too."),
    ] = None,
    far_positions: Annotated[
        bool | None,
        typer.Option(
            "--far-positions/--no-far-positions",
            help="Rotate queries and keys of strided and full layers (xPos).",
        ),
    ] = None,
    *,
    options: Options,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out; settings that you leave out stay the same.")
    ] = False,
) -> None:
    """Train a LongNet on bytes, or tokens, and write a run folder: model, metrics, checkpoint, report.html.

    Started by --init-from with the folder of a Llama, GPT-2 or Qwen, say, it trains that transformer with dilated attention.

    Needs no download: without --data it learns the source code of Python's standard library. After a kill at any
    moment, the same command with --resume continues from the last checkpoint, with the losses of a run that never stopped.

    Over several processes: torchrun --nproc-per-node 4 -m longnet train --cp 4 ... shares each window among four. Without
    --cp each process takes its own windows from the batch.
    """
    of_layers = {
        "layer_types": None if layer_types is None else tuple(one.strip() for one in layer_types.split(",")),
        "sliding_window": window,
        "stride": stride,
        "stride_block": stride_block,
        "shift_keys": shift_keys,
        "far_positions": far_positions,
    }
    changes = {name: value for name, value in of_layers.items() if value is not None}
    options["out"] = str(out)
    if (path := one_data(data)) is not None:
        options["data"] = str(path.absolute())
    if init_from is not None:
        options["init_from"] = str(init_from.absolute())
    _run(_make_settings(options, _Named(preset, stack, config), changes, resume), resume)


@dataclass(frozen=True)
class _Named:
    """Where the model comes from, as the options say."""

    preset: str | None
    stack: str | None
    config: Path | None

    def __bool__(self) -> bool:
        return any((self.preset, self.stack, self.config))


def _make_settings(options: Options, named: _Named, changes: Options, resume: bool) -> TrainSettings:
    """Settings from the options; the rest comes from the run that is resumed, or from the defaults of a new one.

    ``changes`` are to the model. They and a config file change the model of ``init_from``, of a resumed run the run's own.
    """
    from longnet.training.device import choose_dtype
    from longnet.training.folder import RunFolder
    from longnet.training.initial import open_initial
    from longnet.training.resume import read_settings

    saved = read_settings(RunFolder(options["out"])) if resume else None
    start: Config | None = None
    if saved is not None:
        start = saved.model if saved.init_from is not None else None
    elif "init_from" in options:
        start, _ = open_initial(options["init_from"])
    if options.get("dtype", None if resume else "auto") == "auto":
        in_bfloat16 = options.get("weights") == "bfloat16"
        options["dtype"] = "bfloat16" if in_bfloat16 else choose_dtype(options.get("device", "auto"))
    if saved is None and "steps" not in options and "minutes" not in options:
        options["steps"] = DEFAULT_STEPS
    if isinstance(start, TransformerConfig):
        if saved is None or named or changes:
            options["model"] = _transformer_of(start, options, named, changes, saved)
        return TrainSettings(**options) if saved is None else saved.replace(**options)
    if saved is not None and start is None:
        assert not isinstance(saved.model, TransformerConfig)
        start = saved.model if named.stack is not None and named.preset is None else None
    model = _read_model(named, changes, start)
    if saved is not None:
        assert not isinstance(saved.model, TransformerConfig)
        if model is not None or changes:
            # The tokenizer gave the run its vocabulary, as it gives a new run its own.
            model = (model or saved.model).replace(vocab_size=saved.model.vocab_size)
            options["model"] = _with_layers(model, changes)
        return saved.replace(**options)
    made = _with_layers(model or start or _preset(DEFAULT_PRESET, None, changes), changes)
    tokenizer = tokenizer_of(options)
    size = made.vocab_size if tokenizer is None else tokenizer.vocab_size
    return TrainSettings(model=made.replace(vocab_size=size), **options)


def _transformer_of(
    start: TransformerConfig,
    options: Options,
    named: _Named,
    changes: Options,
    saved: TrainSettings | None,
) -> TransformerConfig:
    """The model of transformers with the attention that the options ask for, for their context and tokenizer.

    Raises:
        ValueError: options that belong to LongNets, no tokenizer, or a model that does not fit.
    """
    from longnet.models.layer_types import DILATED_TYPES
    from longnet.training.models import fit_context

    kind = f"a model of transformers ({start.transformer['model_type']!r})"
    for name, value in (("--preset", named.preset), ("--stack", named.stack)):
        if value is not None:
            raise ValueError(
                f"{name} {value} with {kind}: expected --layer-types, --config with fields of its attention, or neither"
            )
    config = named.config
    for name in ("shift_keys", "far_positions"):
        if name in changes:
            raise ValueError(
                f"{_shown({name: changes[name]})} with {kind}: expected a LongNet, it is no option of longnet.hf.apply"
            )
    model = start if config is None else read_config("--config", config, start)
    if not isinstance(model, TransformerConfig) or model.transformer != start.transformer:
        raise ValueError(f"--config {config} with {kind}: expected fields of its attention alone, segment_lengths say")
    if (types := changes.get("layer_types")) is not None and not set(types) & set(DILATED_TYPES) and config is None:
        changes = {"segment_lengths": (), "dilation_rates": (), **changes}
    model = model.replace(**changes)
    if saved is not None:
        return model
    tokenizer = tokenizer_of(options)
    rows = start.transformer["vocab_size"]
    if tokenizer is None and rows != 256:
        raise ValueError(
            f"--init-from {options['init_from']} has {rows} tokens and holds no tokenizer.json: expected --tokenizer as well"
        )
    size = None if tokenizer is None else tokenizer.vocab_size
    return fit_context(model.replace(tokenizer_size=size), options.get("context", TrainSettings.context))


def _with_layers(model: LongNetConfig, changes: Options) -> LongNetConfig:
    """The model with other layers. Without a layer that reads far, keys are as they are and all layers have positions.

    Raises:
        ValueError: changes of layers that it does not have.
    """
    from longnet.models.layer_types import DILATED_TYPES, FAR_TYPES

    if not changes:
        return model
    types = changes.get("layer_types", model.layer_types)
    if types is None:
        raise ValueError(
            f"{_shown(changes)} given for a model whose layers are all 'dilated_attention': expected --stack or --layer-types "
            "as well"
        )
    used = {
        "stride": FAR_TYPES[:1],
        "stride_block": FAR_TYPES[:1],
        "sliding_window": ("sliding_attention", *FAR_TYPES[:1]),
    }
    for name, kinds in used.items():
        if name in changes and not set(types) & set(kinds):
            raise ValueError(
                f"{_shown({name: changes[name]})} with layers of {tuple(dict.fromkeys(types))}: expected one of {kinds}"
            )
    if set(types) & set(DILATED_TYPES) and not model.segment_lengths:
        raise ValueError(
            "--layer-types with dilated layers, and no segments: expected --config with segment_lengths and dilation_rates"
        )
    if not set(types) & set(FAR_TYPES):
        changes = {"shift_keys": False, "far_positions": True, **changes}
    return model.replace(**changes)


def _shown(changes: Options) -> str:
    """Options by the names of fields."""
    names = {name.replace("sliding_", "").replace("_", "-"): value for name, value in changes.items()}
    return ", ".join(f"--no-{name}" if value is False else f"--{name}" for name, value in names.items())


def _restacked(model: LongNetConfig, stack: str, changes: Options) -> LongNetConfig:
    """A model's size with the layers of a stack.

    Raises:
        ValueError: an unknown stack, one beside types of layers, or the paper's for a model without segments.
    """
    from longnet.models.stacks import STACKS

    if stack not in STACKS:
        raise ValueError(f"stack={stack!r} is not a stack: expected one of {tuple(STACKS)}")
    if "layer_types" in changes:
        raise ValueError(f"--stack {stack} with --layer-types: expected one of the two")
    fields = STACKS[stack](model.layers, model.sliding_window)
    if fields["layer_types"] is None and not model.segment_lengths:
        raise ValueError(
            f"--stack {stack} for a model without segments: expected --preset as well, or --config with segment_lengths"
        )
    return model.replace(**fields)


def _preset(name: str, stack: str | None, changes: Options) -> LongNetConfig:
    from longnet.models import LongNetConfig

    return LongNetConfig.preset(name, stack, **{key: changes[key] for key in ("layer_types",) if key in changes})


def _read_model(named: _Named, changes: Options, start: LongNetConfig | None) -> LongNetConfig | None:
    """The model config that --preset and --stack name, or ``start`` as --stack or --config changes it; ``None`` for none of them.

    Raises:
        ValueError: a preset and a file, an unknown name or field, a file that is neither JSON nor TOML.
    """
    preset, stack, config = named.preset, named.stack, named.config
    if config is not None:
        for name, value in (("preset", preset), ("stack", stack)):
            if value is not None:
                raise ValueError(
                    f'--{name} and --config were both given: expected one (a config file may name a "{name}")'
                )
    if stack is not None and preset is None and start is not None:
        return _restacked(start, stack, changes)
    if preset is not None or stack is not None:
        return _preset(preset or DEFAULT_PRESET, stack, changes)
    if config is None:
        return None
    made = read_config("--config", config, start)
    if isinstance(made, TransformerConfig):
        raise ValueError(f"--config {config} is of a model of transformers: expected --init-from its run folder")
    return made


def _run(settings: TrainSettings, resume: bool) -> None:
    from longnet.training.loop import train as train_model
    from longnet.training.progress import SilentReporter, format_seconds, make_reporter
    from longnet.training.ranks import join_ranks
    from longnet.training.report import long_context_verdict, write_report

    with join_ranks(settings.cp, settings.device) as (ranks, device):
        reporter = make_reporter(outlives_reader=True) if ranks.is_first else SilentReporter()
        settings = settings.replace(device=device)
        with stop_on_signal(reporter.say, "this step") as stopping:
            summary = train_model(
                settings,
                resume=resume,
                reporter=reporter,
                should_stop=lambda: stopping.asked() or reporter.is_closed,
                ranks=ranks,
                waiting=stopping.waiting,
            )
    if not ranks.is_first:
        # The first process prints, writes and reports for all.
        raise typer.Exit(0 if summary.finished else INTERRUPTED)
    where = shlex.join(["longnet", "train", "--out", settings.out, "--resume"])
    if not summary.finished:
        stopped = f"Stopped and saved after step {summary.step:,}. To continue: {where}"
        reporter.say(stopped)
        if reporter.is_closed:
            print(f"longnet: standard output was closed. {stopped}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED)
    data = summary.data
    reporter.say(
        f"Trained {summary.step:,} steps on {summary.tokens:,} {data.unit} in {format_seconds(summary.seconds)}"
    )
    evaluation = write_report(settings.out, corpus=data, reporter=reporter)
    base = evaluation.baselines
    reporter.say(
        f"Held out: {evaluation.bits_per_byte.mean:.4f} bits per byte; "
        f"lzma {base.lzma:.4f}, unigram {base.unigram:.4f} on the same {base.compressed_bytes:,} bytes"
    )
    reporter.say(long_context_verdict(evaluation))
