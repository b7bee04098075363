"""Private names of other libraries: which versions they are known from, and what is said where one has gone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any


@dataclass(frozen=True)
class Tried:
    """The versions of ``library`` that the names in one ``*_internals.py`` were tried with, as major.minor.

    Other versions run too. The tests fail with a newer one, so that someone compares that file with the library.
    """

    library: str
    oldest: str
    newest: str

    @property
    def installed(self) -> str:
        """The version that is imported."""
        return str(resolve_name(f"{self.library}.__version__"))

    def unknown(self) -> str | None:
        """What to do about the installed version if it is not among those tried; None if it is."""
        if _release(self.oldest) <= _release(self.installed) <= _release(self.newest):
            return None
        return (
            f"{self.library} {self.installed} is installed and longnet was tried with {self.oldest} to {self.newest}: look up "
            f"every name of {self.library}_internals.py in it, run the tests, then change TRIED there"
        )

    def gone(self, what: object) -> RuntimeError:
        """The error for a name, or a form of it, that the library has no more."""
        return RuntimeError(
            f"longnet relies on an internal of {self.library} that {self.library} {self.installed} does not have: {what}. "
            f"Expected {self.library} {self.oldest} to {self.newest}, or a newer longnet"
        )

    def get(self, path: str) -> Any:
        """What stands under a dotted name.

        Raises:
            RuntimeError: nothing does.
        """
        try:
            return resolve_name(path)
        except (AttributeError, ImportError):
            raise self.gone(path) from None

    def of(self, owner: object, name: str) -> Any:
        """An attribute of an object.

        Raises:
            RuntimeError: it has none of this name.
        """
        try:
            return getattr(owner, name)
        except AttributeError as error:
            raise self.gone(error) from None

    def function(self, path: str) -> Callable[..., Any]:
        """The function of a dotted name; where it has gone, one that says so when it is called, so that imports succeed."""
        try:
            function: Callable[..., Any] = self.get(path)
            return function
        except RuntimeError as error:
            message = str(error)

        def missing(*_: Any, **__: Any) -> Any:
            raise RuntimeError(message)

        return missing


def _release(text: str) -> tuple[int, ...]:
    """(2, 13) of 2.13.0+cpu."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])
