"""Frozen dataclasses that every call looks up in caches: the hash of each is computed once."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")

# Where an object holds its hash.
_KEPT = "_hash"


def hash_once(cls: type[T]) -> type[T]:
    """A class decorator, above ``@dataclass(frozen=True)``: else every lookup goes through all of a nested object."""
    compute = cls.__hash__

    def kept_hash(self: T) -> int:
        kept: int | None = self.__dict__.get(_KEPT)
        if kept is None:
            kept = self.__dict__[_KEPT] = compute(self)
        return kept

    def state(self: T) -> dict[str, Any]:
        # For copies and pickles: hashes of text differ from process to process.
        return {name: value for name, value in self.__dict__.items() if name != _KEPT}

    setattr(cls, "__hash__", kept_hash)  # noqa: B010
    setattr(cls, "__getstate__", state)  # noqa: B010
    return cls
