"""Old spellings of arguments, translated before the function that they are given to sees them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def accept_spellings(**spellings: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator: the function takes these keywords too, each for the argument that it names.

    The argument's default must be False, and None stands for an old spelling that is not given.

    Raises (the decorated function):
        ValueError: both spellings are given and differ.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)

        @wraps(function)
        def translated(*args: P.args, **options: P.kwargs) -> T:
            old = {spelling: options.pop(spelling) for spelling in spellings if spelling in options}
            if not old:
                return function(*args, **options)
            bound = signature.bind_partial(*args, **options)
            for spelling, value in old.items():
                name = spellings[spelling]
                said = bound.arguments.get(name, False)
                if value is None:
                    continue
                if said is not False and said is not value:
                    raise ValueError(f"{name}={said} and {spelling}={value} contradict each other: give one of them")
                bound.arguments[name] = value
            return function(*bound.args, **bound.kwargs)

        return translated

    return decorate
