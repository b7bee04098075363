"""The layers that the options of ``longnet inspect`` ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longnet.checks import check_int
from longnet.cli.inspect_layers import Layers
from longnet.cli.model_config import read_config
from longnet.geometry.pattern import Pattern
from longnet.geometry.reach import LayerAttention

if TYPE_CHECKING:
    from longnet.models import LongNetConfig
    from longnet.training.models import Config

# Options that ask for a view by layer; those that come with ``--layer-types`` alone; those that a whole model takes.
BY_LAYER = {
    *("window", "all_queries", "dilation_block", "segment_offset"),
    *("layer_types", "stride", "stride_block", "shift_keys", "model", "preset", "stack"),
}
_OF_TYPES = {"stride", "stride_block", "shift_keys"}
# How many windows long the sequence is where no layer is dilated and no length was given.
_WINDOWS = 16
# Options that change a preset, and their fields.
_OF_PRESET = {"window": "sliding_window", "stride": "stride", "stride_block": "stride_block", "kv_heads": "kv_heads"}
_WITH_MODEL = {"length", "out", "as_json"}


def layers_of(options: dict[str, Any], named: set[str], causal: bool) -> Layers:
    """The layers that the options ask for.

    Raises:
        TypeError, ValueError: options that do not go together, or values that are out of range.
    """
    if "suggest_budget" in named:
        raise ValueError("--suggest-budget suggests one of the paper's patterns: leave out the options of other layers")
    if "model" in named:
        if refused := sorted(named - _WITH_MODEL - {"model"}):
            raise ValueError(f"--model has layers of its own: leave out {', '.join(map(_option, refused))}")
        return _of_config(read_config("--model", options["model"]), options["length"])
    if "preset" in named:
        if refused := sorted(named - _WITH_MODEL - {"preset", "stack"} - _OF_PRESET.keys()):
            raise ValueError(f"--preset has layers of its own: leave out {', '.join(map(_option, refused))}")
        changes = {field: options[name] for name, field in _OF_PRESET.items() if name in named}
        return _of_config(_of_preset(options["preset"], options["stack"], changes), options["length"])
    if "stack" in named:
        raise ValueError(f"--stack {options['stack']} given without --preset: expected it as well")
    if "layer_types" in named:
        if refused := sorted(named & {"all_queries", "dilation_block", "segment_offset"}):
            raise ValueError(f"--layer-types says what layers compute: leave out {', '.join(map(_option, refused))}")
        return _of_config(_config(options, causal), options["length"])
    if refused := sorted(named & _OF_TYPES):
        raise ValueError(f"{', '.join(map(_option, refused))} given without --layer-types: expected it as well")
    return _of_pattern(options, causal)


def _of_preset(name: str, stack: str | None, changes: dict[str, Any]) -> LongNetConfig:
    from longnet.models import LongNetConfig

    return LongNetConfig.preset(name, stack, **changes)


def _config(options: dict[str, Any], causal: bool) -> LongNetConfig:
    from longnet.models import LongNetConfig

    optional = {
        "sliding_window": options["window"],
        "stride": options["stride"],
        "stride_block": options["stride_block"],
        "kv_heads": options["kv_heads"],
    }
    return LongNetConfig(
        dim=options["heads"] * options["head_dim"],
        heads=options["heads"],
        layers=options["layers"],
        segment_lengths=() if options["segments"] is None else tuple(integers("--segments", options["segments"])),
        dilation_rates=() if options["rates"] is None else tuple(integers("--rates", options["rates"])),
        head_offsets=options["head_offsets"],
        layer_types=tuple(one.strip() for one in options["layer_types"].split(",")),
        shift_keys=options["shift_keys"],
        causal=causal,
        use_xpos=False,
        **{name: value for name, value in optional.items() if value is not None},
    )


def _of_config(config: Config, length: int | None) -> Layers:
    from longnet.models.layer_types import DILATED_TYPES, expand_layer_types

    layers, heads = config.layer_attentions(), config.heads
    names = expand_layer_types(config.layer_types or ("dilated_attention",), config.layers)
    group = heads // (config.kv_heads or heads)
    if length is None:
        windows = _WINDOWS * (config.sliding_window or 1)
        length = max(config.segment_lengths) if set(DILATED_TYPES) & set(names) else windows
    kv_heads = tuple(layer.heads // group for layer in layers)
    return Layers(names, layers, kv_heads, config.head_dim, check_int("length", length, 1), config.causal)


def _of_pattern(options: dict[str, Any], causal: bool) -> Layers:
    heads = check_int("heads", options["heads"], 1)
    kv_heads = heads if options["kv_heads"] is None else options["kv_heads"]
    segments, rates = options["segments"], options["rates"]
    pattern = Pattern.compose(
        () if segments is None else _lengths(segments),
        () if rates is None else integers("--rates", rates),
        window=options["window"],
        dilated_queries=not options["all_queries"],
        dilation_block=options["dilation_block"],
        head_offsets=options["head_offsets"],
    ).grouped(heads, kv_heads)
    count = check_int("layers", options["layers"], 1)
    length = options["length"]
    if length is None:
        length = max(pattern.longest_finite, pattern.window or 1)
    layer = LayerAttention(pattern, heads, check_int("segment_offset", options["segment_offset"]))
    of_all = ("pattern",) * count, (layer,) * count, (kv_heads,) * count
    return Layers(*of_all, check_int("head_dim", options["head_dim"], 1), check_int("length", length, 1), causal)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _lengths(text: str) -> list[int | None]:
    return [None if one.strip() == "none" else integers("--segments", one)[0] for one in text.split(",")]


def integers(option: str, text: str) -> list[int]:
    values = []
    for item in text.split(","):
        try:
            values.append(int(item))
        except ValueError:
            raise ValueError(
                f"{option} {text!r} holds {item.strip()!r}: expected whole numbers separated by commas, say 2048,4096"
            ) from None
    return values
