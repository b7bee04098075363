"""A model's config from a file that a user wrote, or a run folder."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longnet.training.models import Config


def read_config(option: str, path: Path, start: Config | None = None) -> Config:
    """The config in a JSON or TOML file of LongNetConfig's fields, with a ``preset`` and ``stack`` to start from, or a run's.

    Fields that the file leaves out are those of ``start``, where that is given and the file names no preset.

    Raises:
        ValueError: a folder without ``config.json``, neither JSON nor TOML, no table of fields, or an unknown field or preset;
            ``option`` is for the message.
    """
    from longnet.models import LongNetConfig
    from longnet.training.models import config_from_dict, refuse_hugging_face

    file = path / "config.json" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise ValueError(f"{option} {path} holds no config.json: expected a run folder, or a JSON or TOML file")
    text = file.read_text(encoding="utf-8")
    is_toml = file.suffix.lower() == ".toml"
    try:
        values = tomllib.loads(text) if is_toml else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{option} {file} is not {'TOML' if is_toml else 'JSON'}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{option} {file} holds a {type(values).__name__}: expected fields of LongNetConfig")
    refuse_hugging_face(values, f"{option} {file}", "fields of LongNetConfig, or those of a run folder")
    if "stack" in values and "preset" not in values:
        raise ValueError(f'{option} {file} names the stack {values["stack"]!r} and no "preset": expected both')
    if "preset" in values:
        return LongNetConfig.preset(values.pop("preset"), values.pop("stack", None), **values)
    return config_from_dict(values) if start is None else start.replace(**values)
