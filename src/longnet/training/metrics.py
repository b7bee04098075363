"""JSON lines beside a saved state: one object a line, ordered by a count (``step``, ``position``) that each line has."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from longnet.training.files import write_bytes


class MetricsLog:
    """Appends lines to a metrics file; each line goes to the system whole, as soon as it is written.

    Args:
        path: the file, made if it is missing.
        keep_to: first drop lines with a larger count, and a line that a kill left half-written.
        count: the name of the integer that every line has.
        drop_kind: lines of this kind are dropped too, whatever their count.

    Raises:
        ValueError: a line (other than the last) that is not a JSON object with a count; the message names file and line.
    """

    def __init__(self, path: Path, keep_to: int, count: str = "step", drop_kind: str | None = None) -> None:
        lines = read_metrics(path, count) if path.exists() else []
        lines = [line for line in lines if line[count] <= keep_to and (not drop_kind or line.get("kind") != drop_kind)]
        content = b"".join(_encode(line) for line in lines)
        write_bytes(path, content)
        self._file: BinaryIO = open(path, "ab")  # noqa: SIM115 - closed by close()

    def write(self, **values: Any) -> None:
        """Append one line."""
        self._file.write(_encode(values))
        self._file.flush()

    def flush_to_disk(self) -> None:
        """Return once every line is on disk, so that a saved state is never ahead of the lines."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path, count: str = "step") -> list[dict[str, Any]]:
    """The lines of a metrics file, oldest first; a half-written last line is left out.

    Raises:
        ValueError: any other line that is not a JSON object with an integer ``count``; the message names file and line.
    """
    lines = path.read_bytes().split(b"\n")
    values: list[dict[str, Any]] = []
    # After the last newline there is nothing, or a line that a kill cut short.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(value, dict) or not isinstance(value.get(count), int):
            raise ValueError(f"{path} line {number} has no {count}: expected lines written by longnet")
        values.append(value)
    return values


def _encode(values: dict[str, Any]) -> bytes:
    return json.dumps(values, allow_nan=False).encode("utf-8") + b"\n"
