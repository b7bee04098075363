"""Dilated models in folders: what plain transformers loads is never silently dense, it refuses.

transformers saves no attention implementation. So the config of a dilated model writes the pattern, and ``layer_types`` that
transformers does not know: no class reads such a config, and the error says how to load the folder. The config itself does
this, because a model around a dilated part saves the part's config without asking the part.
"""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from torch import nn
from transformers import PretrainedConfig

from longnet.hf.own_configs import own_configs
from longnet.hf.transformers_internals import model_that_is_saved

ENTRY = "longnet"
_TYPE = "dilated_attention"
# Fields that the entry holds meanwhile. Without a number of layers the config of no model in particular is read, which is what
# ``Trainer`` does when it resumes a model that it was given; every model's own config has a number and refuses.
_MOVED = ("layer_types", "num_hidden_layers")
# Under which the entry holds the ``layer_types`` of :func:`longnet.hf.apply`, and fields of the config that it changed.
_TYPES, _OWN = "types", "own"
_HOW = f"{_TYPE} (load this folder with longnet.hf.load)"


class MarkedDict:
    """``to_dict`` of one config of a dilated model. No bound method: pickle would make it the class's own again."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config

    def __call__(self) -> dict[str, Any]:
        plain = type(self.config).to_dict(self.config)
        del plain["to_dict"]
        return _marked(plain)

    def __eq__(self, other: object) -> bool:
        # Configs compare their attributes, this one among them.
        return type(other) is type(self)

    __hash__ = None  # type: ignore[assignment]


class DictAround:
    """``to_dict`` of the config that a dilated part had: the part's mark when a model around the part is saved."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        # A config around this one writes a copy of it, which has this key.
        self.key = uuid4().hex

    def __call__(self) -> dict[str, Any]:
        plain = type(self.config).to_dict(self.config)
        del plain["to_dict"]
        outer = model_that_is_saved()
        parts = [] if outer is None else [config for part in outer.modules() for config in own_configs(part)]
        around = [getattr(part.shared.__dict__.get("to_dict"), "key", None) for part in parts]
        entries = [getattr(part.own, ENTRY) for part, key in zip(parts, around, strict=True) if key == self.key]
        if len(entries) > 1:
            raise ValueError(
                f"{type(outer).__name__} has {len(entries)} dilated parts of one config, which holds one pattern: expected "
                "each to be saved by itself, or longnet.hf.restore(part) of all but one first"
            )
        return _marked({**plain, ENTRY: entries[0]}) if entries else plain

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    __hash__ = None  # type: ignore[assignment]


def mark_around(config: PretrainedConfig) -> None:
    """Let ``config``, which a dilated part has a copy of, write the part's mark with a model around the part."""
    config.__dict__.setdefault("to_dict", DictAround(config))


def unmark_around(config: PretrainedConfig) -> None:
    """Undo :func:`mark_around`."""
    config.__dict__.pop("to_dict", None)


def mark(config: PretrainedConfig, entry: dict[str, Any], whole: PretrainedConfig) -> None:
    """Let ``config`` write the pattern and refuse to be read by plain transformers, whoever saves it.

    Args:
        config: of the attention layers. entry: arguments of :func:`longnet.hf.apply`. whole: of the model, the same or around it.

    Raises:
        ValueError: a config whose class reads the mark without a check; it is then as it was.
    """
    setattr(config, ENTRY, entry)
    config.__dict__["to_dict"] = MarkedDict(config)
    try:
        type(whole).from_dict(whole.to_dict())
    except Exception:
        return
    unmark(config)
    raise ValueError(
        f"{type(whole).__name__} of this transformers reads layer_types without a check, so a saved dilated model would load "
        "as a dense one: expected a config that checks"
    )


def unmark(config: PretrainedConfig) -> None:
    """Undo :func:`mark`."""
    delattr(config, ENTRY)
    del config.__dict__["to_dict"]


def refuse_unmarked(part: nn.Module, prefix: str, _: bool) -> None:
    """A hook before ``state_dict`` of a dilated model that is a part: whoever saves it around must save its mark too."""
    outer = model_that_is_saved() if prefix else None
    if outer is not None and _HOW not in repr(outer.config.to_dict()):
        raise ValueError(
            f"{type(outer).__name__} saves a config without that of its dilated part {type(part).__name__}, so it would "
            "load as a dense model: expected the part to be saved by itself, or longnet.hf.restore(part) first"
        )


def entries(config: dict[str, Any], where: object) -> tuple[dict[str, Any], dict[tuple[str, ...], dict[str, Any]]]:
    """A saved config as it was before it was marked, and the arguments of :func:`longnet.hf.apply` by the place of the config
    that holds them: ``()`` for the whole model, ``("vision_config",)`` for a part.

    Raises:
        ValueError: none of a dilated model.
    """
    applied: dict[tuple[str, ...], dict[str, Any]] = {}
    plain = _unmarked(config, (), applied)
    if not applied:
        raise ValueError(
            f"the config in {str(where)!r} has no {ENTRY!r} entry with a pattern: expected a folder that a model under "
            "longnet.hf.apply has saved"
        )
    return plain, applied


def _unmarked(
    config: dict[str, Any], place: tuple[str, ...], applied: dict[tuple[str, ...], dict[str, Any]]
) -> dict[str, Any]:
    entry = config.get(ENTRY)
    if isinstance(entry, dict) and "segment_lengths" in entry:
        applied[place] = {name: value for name, value in entry.items() if name not in (*_MOVED, _OWN, _TYPES)}
        if _TYPES in entry:
            applied[place]["layer_types"] = entry[_TYPES]
        rest = {name: value for name, value in config.items() if name not in (ENTRY, *_MOVED)}
        config = {**rest, **{name: entry[name] for name in _MOVED if name in entry}}
    return {
        name: _unmarked(value, (*place, name), applied) if isinstance(value, dict) else value
        for name, value in config.items()
    }


def as_before(entry: dict[str, Any]) -> dict[str, Any]:
    """Fields of the config as they were before :func:`longnet.hf.apply` changed them."""
    fields: dict[str, Any] = entry.get(_OWN, {})
    return fields


def _marked(config: dict[str, Any]) -> dict[str, Any]:
    config = {**config, **as_before(config[ENTRY])}
    moved = {name: config[name] for name in _MOVED if config.get(name) is not None}
    rest = {name: value for name, value in config.items() if name not in _MOVED}
    layer_types = [_HOW, *[_TYPE] * (config[ENTRY]["attention_layers"] - 1)]
    return {**rest, ENTRY: {**config[ENTRY], **moved}, "layer_types": layer_types}
