"""Dilated models in folders: what plain transformers loads is never silently dense, it refuses.

transformers saves no attention implementation, so a folder's ``config.json`` carries the pattern, and ``layer_types`` that
transformers does not know: it reads no such config, by whatever class, and its error says how to load the folder.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

ENTRY = "longnet"
_TYPE = "dilated_attention"
# What the entry keeps meanwhile. Without a number of layers the config of no model in particular is read, which is what
# ``Trainer`` does when it resumes a model that it was given; every model's own config has a number and refuses.
_MOVED = ("layer_types", "num_hidden_layers")
_HOW = f"{_TYPE} (load this folder with longnet.hf.load)"


def save_pretrained(self: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> None:
    """``PreTrainedModel.save_pretrained`` of a dilated model, into a folder that only :func:`longnet.hf.load` reads.

    Raises:
        ValueError: ``push_to_hub=True`` (save, then push the folder), or a model whose class cannot be made to refuse.
    """
    if options.get("push_to_hub"):
        raise ValueError(
            "push_to_hub=True in save_pretrained of a dilated model: the folder is marked after it is written; expected "
            "model.push_to_hub(name)"
        )
    _check_refused(self.config)
    type(self).save_pretrained(self, save_directory, *args, **options)
    path = Path(save_directory) / "config.json"
    # One process of many writes.
    if path.is_file():
        path.write_text(json.dumps(_marked(json.loads(path.read_text("utf-8"))), indent=2) + "\n", encoding="utf-8")


def unmarked(config: dict[str, Any], where: object) -> dict[str, Any]:
    """A saved config as it was before it was marked; ``longnet`` holds the arguments of :func:`longnet.hf.apply`.

    Raises:
        ValueError: none of a dilated model.
    """
    entry = config.get(ENTRY)
    if not isinstance(entry, dict) or "segment_lengths" not in entry:
        raise ValueError(
            f"the config in {str(where)!r} has no {ENTRY!r} entry with a pattern: expected a folder that a model under "
            "longnet.hf.apply has saved"
        )
    kept = {name: entry[name] for name in _MOVED if name in entry}
    rest = {name: value for name, value in config.items() if name not in (ENTRY, *_MOVED)}
    return {**rest, **kept, ENTRY: {name: value for name, value in entry.items() if name not in _MOVED}}


def _marked(config: dict[str, Any]) -> dict[str, Any]:
    moved = {name: config[name] for name in _MOVED if config.get(name) is not None}
    rest = {name: value for name, value in config.items() if name not in _MOVED}
    layer_types = [_HOW, *[_TYPE] * (config[ENTRY]["attention_layers"] - 1)]
    return {**rest, ENTRY: {**config[ENTRY], **moved}, "layer_types": layer_types}


def _check_refused(config: PretrainedConfig) -> None:
    try:
        type(config).from_dict(_marked(config.to_dict()))
    except Exception:
        return
    raise ValueError(
        f"{type(config).__name__} of this transformers reads layer_types without a check, so a saved dilated model would load "
        "as a dense one: expected a config that checks; save the state_dict, or longnet.hf.restore(model) first"
    )
