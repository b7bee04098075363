"""Options that several commands share: paths, and those made from a dataclass of settings (:func:`longnet.checks.setting`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

Options: TypeAlias = dict[str, Any]
"""The settings that the user gave, by name."""


def read_path(value: str) -> Path:
    """The path that an option names."""
    if not value:
        raise typer.BadParameter("'' is empty: expected a path")  # pathlib takes it as the current folder.
    return Path(value)


def path_option(*names: str, **more: Any) -> Any:
    """A ``typer.Option`` of a path, which is not empty."""
    return typer.Option(*names, parser=read_path, metavar="<path>", **more)


def one_data(paths: list[Path] | None) -> Path | None:
    """The only ``--data``; it is read as a list, as of an option with one value the last one would count silently."""
    if paths and len(paths) > 1:
        raise ValueError(
            f"--data given {len(paths)} times: expected one file or folder (a folder may hold links to the others)"
        )
    return paths[0] if paths else None


_TYPES = {"int": int, "float": float, "str": str, "bool": bool}


def options_of(settings: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's parameter ``options`` by one option for every field of ``settings`` that has a help text."""
    added = {one.name: _parameter(one) for one in fields(settings) if one.metadata.get("help")}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            chosen = {name: values.pop(name) for name in added}
            command(**values, options={name: value for name, value in chosen.items() if value is not None})

        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for name, parameter in signature.parameters.items():
            parameters += added.values() if name == "options" else [parameter]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _parameter(setting: Field[Any]) -> inspect.Parameter:
    """The option of a field; None, the default, leaves the setting to its dataclass or to the run that is resumed."""
    shown = setting.metadata["shown"]
    if shown is None and setting.default is not None:
        shown = str(setting.default)
    option = typer.Option(help=setting.metadata["help"], show_default=shown or True)
    kind = _TYPES[str(setting.type).removesuffix(" | None")]
    return inspect.Parameter(
        setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )
