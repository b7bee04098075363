"""Checks of arguments: errors that name the argument, its value and what was expected."""

from __future__ import annotations

import inspect
import math
import os
import reprlib
from collections.abc import Iterable
from dataclasses import MISSING, field, fields
from typing import Any, TypeVar

T = TypeVar("T")


def is_int(value: object) -> bool:
    """Whether it is an int; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_int(name: str, value: object, least: int | None = None) -> int:
    """``value`` itself.

    Raises:
        TypeError: it is not an int.
        ValueError: it is below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} has type {type(value).__name__}: expected an int")
    if least is not None and value < least:
        raise ValueError(f"{name}={value}: expected at least {least}")
    return value


def check_ints(least: int | None = None, /, **values: object) -> None:
    """:func:`check_int` for each of several arguments."""
    for name, value in values.items():
        check_int(name, value, least)


def check_flags(**values: object) -> None:
    """Raises TypeError for a value that is not a bool."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r} has type {type(value).__name__}: expected a bool")


def check_string(name: str, value: object) -> str:
    """``value`` itself.

    Raises:
        TypeError: it is not a string.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name}={short_repr(value)} has type {type(value).__name__}: expected a string")
    return value


def check_path(name: str, value: object) -> str:
    """The path as a string.

    Raises:
        TypeError: it is neither a string nor an ``os.PathLike`` of one.
    """
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str):
        raise TypeError(
            f"{name}={short_repr(value)} has type {type(value).__name__}: expected a path, a string or an os.PathLike"
        )
    return path


def check_callable(name: str, value: object) -> None:
    """Raises TypeError for a value that cannot be called, and is not None."""
    if value is not None and not callable(value):
        raise TypeError(f"{name}={short_repr(value)} has type {type(value).__name__}: expected a function, or None")


def short_repr(value: object) -> str:
    """On one line; a value of the wrong type may be long, a data set say."""
    return " ".join(reprlib.repr(value).split())


def check_number(
    name: str, value: object, least: float = -math.inf, most: float = math.inf, *, above: bool = False
) -> float:
    """``value`` itself.

    Args:
        least, most: bounds, which are allowed, with ``above`` except ``least``. With either of them the value must be finite.

    Raises:
        TypeError: it is not a number.
        ValueError: it is out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r} has type {type(value).__name__}: expected a number")
    if least > -math.inf and (not math.isfinite(value) or not least <= value <= most or (above and value == least)):
        low = f"above {least:g}" if above else f"at least {least:g}"
        raise ValueError(f"{name}={value}: expected {low}{f' and at most {most:g}' if most < math.inf else ''}")
    return value


def setting(
    default: Any = MISSING,
    help: str = "",
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] = (),
    shown: str | None = None,
) -> Any:
    """A field of a frozen dataclass of settings, for :func:`check_settings` and the command line.

    Args:
        default: as of ``dataclasses.field``.
        help: the text of its option; without one it is no option.
        least, above, most: its bounds; a number must be larger than ``above``.
        choices: the strings that it may be.
        shown: the default that the command line shows, where that is not ``default``.
    """
    bounds = {"least": least, "above": above, "most": most}
    bounds = {name: bound for name, bound in bounds.items() if bound is not None}
    return field(default=default, metadata={"help": help, "bounds": bounds, "choices": choices, "shown": shown})


def documented(settings: type[T]) -> type[T]:
    """Add the help texts of a dataclass of settings to its docstring, whose last section lists the other attributes."""
    text = inspect.cleandoc(settings.__doc__ or "")
    for one in fields(settings):  # type: ignore[arg-type]
        if one.metadata.get("help") and f" {one.name}: " not in text:
            text += f"\n    {one.name}: {one.metadata['help']}"
    settings.__doc__ = text
    return settings


def check_settings(settings: Any) -> None:
    """Check every field of a dataclass by its annotation, and by the bounds and choices of its :func:`setting`.

    An int is at least 1 where no other bound is set. None is allowed where the annotation says so.

    Raises:
        TypeError: a value of another type. ValueError: a value out of bounds, or none of the choices.
    """
    for one in fields(settings):
        name, value, kind = one.name, getattr(settings, one.name), str(one.type).removesuffix(" | None")
        bounds, choices = one.metadata.get("bounds", {}), one.metadata.get("choices")
        if value is None and kind != one.type:
            continue
        if kind == "bool":
            check_flags(**{name: value})
        elif kind == "int":
            check_int(name, value, bounds.get("least", 1))
        elif kind == "float":
            least = bounds.get("above", bounds.get("least", -math.inf))
            check_number(name, value, least, bounds.get("most", math.inf), above="above" in bounds)
        elif choices and value not in choices:
            raise ValueError(f"{name}={value!r} is unknown: expected one of {choices}")
        elif kind == "str":
            check_string(name, value)


def refuse_unknown(values: Iterable[str], names: tuple[str, ...], what: str) -> None:
    """Raise ValueError for names in ``values`` that are not among ``names``, the fields of ``what``."""
    if unknown := [name for name in values if name not in names]:
        raise ValueError(f"{', '.join(map(repr, unknown))} is no field of {what}: expected one of {names}")
