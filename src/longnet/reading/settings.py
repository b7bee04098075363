"""The settings of a stream, checked before any work is done. Imports no torch: the command line reads them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from longnet.checks import is_int, setting

DTYPES = ("float32", "bfloat16")
STANDARD_INPUT = "-"


@dataclass(frozen=True)
class StreamSettings:
    """The settings of one stream. Immutable. A setting with a help text is an option of ``longnet stream``.

    Attributes:
        run: the run folder whose model reads.
        data: files and folders, read one after the other, or ``("-",)`` for standard input.
        out: the folder for the record and the state.
        tokens: bytes to read at most; None for all of them.
        chunk: bytes per forward pass; None for 65536 on CUDA and 8192 elsewhere.
        dtype: of the forward pass (autocast) and of the cache, or ``"auto"``: bfloat16 on CUDA, float32 elsewhere.
        device: ``"auto"`` (CUDA, else MPS, else the CPU) or a torch device.
        save_every: seconds between two saved states; 0 for one after every chunk.
    """

    run: str
    data: tuple[str, ...]
    out: str
    tokens: int | None = setting(None, "Bytes to read at most.", shown="all")
    chunk: int | None = setting(None, "Bytes per forward pass.", shown="65536 on CUDA, else 8192")
    dtype: str = setting(
        "auto", "Of the forward pass and what it remembers: float32, bfloat16, or auto for bfloat16 on CUDA."
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps.")
    save_every: float = setting(30.0, "Seconds between two saved states.", shown="30")

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", tuple(self.data))
        if not self.data:
            raise ValueError("data=(): expected a file, a folder or '-' for standard input")
        if STANDARD_INPUT in self.data and len(self.data) > 1:
            raise ValueError(f"data={list(self.data)}: expected '-' (standard input) alone, or files and folders")
        for name in ("tokens", "chunk"):
            value = getattr(self, name)
            if value is not None and not is_int(value):
                raise TypeError(f"{name}={value!r} has type {type(value).__name__}: expected an int or None")
        if self.tokens is not None and self.tokens < 2:
            raise ValueError(f"tokens={self.tokens}: expected at least 2, as the first byte is not predicted")
        if self.chunk is not None and self.chunk < 2:
            raise ValueError(f"chunk={self.chunk}: expected at least 2")
        if self.dtype not in (*DTYPES, "auto"):
            raise ValueError(f"dtype={self.dtype!r} is unknown: expected one of {(*DTYPES, 'auto')}")
        if not (math.isfinite(self.save_every) and self.save_every >= 0):
            raise ValueError(f"save_every={self.save_every}: expected a number of seconds, 0 or more")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "data": list(self.data)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StreamSettings:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: an unknown key, or one that is missing.
        """
        known = {field.name for field in fields(cls)}
        if set(values) != known:
            raise ValueError(f"settings hold {sorted(values)}: expected {sorted(known)}")
        return cls(**values)
