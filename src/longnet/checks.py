"""Checks of arguments: errors that name the argument, its value and what was expected."""

from __future__ import annotations

import math


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
