"""The settings of a stream, checked before any work is done."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from longnet.training.settings import choose_dtype, resolve_device

DTYPES = ("float32", "bfloat16")
CHUNKS = {"cuda": 65536}
OTHER_CHUNK = 8192
STANDARD_INPUT = "-"


@dataclass(frozen=True)
class StreamSettings:
    """The settings of one stream. Immutable.

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
    tokens: int | None = None
    chunk: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    save_every: float = 30.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", tuple(self.data))
        if not self.data:
            raise ValueError("data=(): expected a file, a folder or '-' for standard input")
        if STANDARD_INPUT in self.data and len(self.data) > 1:
            raise ValueError(f"data={list(self.data)}: expected '-' (standard input) alone, or files and folders")
        for name in ("tokens", "chunk"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{name}={value!r} has type {type(value).__name__}: expected an int or None")
        if self.tokens is not None and self.tokens < 2:
            raise ValueError(f"tokens={self.tokens}: expected at least 2, as the first byte is not predicted")
        if self.chunk is not None and self.chunk < 2:
            raise ValueError(f"chunk={self.chunk}: expected at least 2")
        if self.dtype not in (*DTYPES, "auto"):
            raise ValueError(f"dtype={self.dtype!r} is unknown: expected one of {(*DTYPES, 'auto')}")
        if not (math.isfinite(self.save_every) and self.save_every >= 0):
            raise ValueError(f"save_every={self.save_every}: expected a number of seconds, 0 or more")

    def resolve(self) -> tuple[StreamSettings, torch.device]:
        """Settings with their chunk and dtype chosen, and the device.

        Raises:
            ValueError: no such device, or none on this machine.
        """
        device = resolve_device(self.device, "float32")
        dtype, chunk = self.dtype, self.chunk
        if dtype == "auto":
            dtype = choose_dtype(str(device)) if device.type == "cuda" else "float32"
        if chunk is None:
            chunk = CHUNKS.get(device.type, OTHER_CHUNK)
        return StreamSettings(**{**asdict(self), "dtype": dtype, "chunk": chunk}), device

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
