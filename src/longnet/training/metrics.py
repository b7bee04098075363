"""JSON lines beside a saved state: one object a line, ordered by a count (``step``, ``position``) that each line has."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from longnet.training.files import write_bytes

Kinds = Mapping[str, Mapping[str, Callable[[Any], bool]]]
"""By the kind of a line: its values, and what each of them must be."""


def is_count(value: Any) -> bool:
    """Whether a value is an integer that is not negative."""
    return type(value) is int and value >= 0


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def is_positive(value: Any) -> bool:
    """Whether a value is a finite number above 0."""
    return is_number(value) and value > 0


def or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """``check``, for a value that may also be None."""
    return lambda value: value is None or check(value)


RUN_LINES: Kinds = {
    "train": {
        "step": is_count,
        "loss": is_number,
        "bits_per_byte": is_number,
        "lr": is_number,
        "grad_norm": or_none(is_number),
        "tokens": is_count,
        "seconds": is_number,
        "tokens_per_second": is_number,
    },
    "eval": {
        "step": is_count,
        "loss": is_number,
        "bits_per_byte": is_number,
        "tokens": is_count,
        "seconds": is_number,
        "windows": is_count,
    },
}
"""The lines of ``metrics.jsonl``."""


class MetricsLog:
    """Appends lines to a metrics file; each line goes to the system whole, as soon as it is written.

    Args:
        path: the file, made if it is missing.
        keep_to: first drop lines with a larger count, and a line that a kill left half-written.
        count: the name of the integer that every line has.
        drop_kind: lines of this kind are dropped too, whatever their count.
        kinds: what the other lines must be; None for no check.

    Raises:
        ValueError: a line (other than the last) that is not a JSON object with a count, or a line of no kind; the message
            names file and line.
    """

    def __init__(
        self, path: Path, keep_to: int, count: str = "step", drop_kind: str | None = None, kinds: Kinds | None = None
    ) -> None:
        lines = _read_lines(path, count) if path.exists() else {}
        lines = {
            number: line
            for number, line in lines.items()
            if line[count] <= keep_to and (not drop_kind or line.get("kind") != drop_kind)
        }
        _check_lines(path, lines, kinds)
        content = b"".join(_encode(line) for line in lines.values())
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


def read_metrics(path: Path, count: str = "step", kinds: Kinds | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics file, oldest first; a half-written last line is left out.

    Raises:
        ValueError: any other line that is not a JSON object with an integer ``count``, or that is of none of the ``kinds``;
            the message names file and line.
    """
    lines = _read_lines(path, count)
    _check_lines(path, lines, kinds)
    return list(lines.values())


def _read_lines(path: Path, count: str) -> dict[int, dict[str, Any]]:
    """The lines by their number, from 1."""
    lines = path.read_bytes().split(b"\n")
    values: dict[int, dict[str, Any]] = {}
    # After the last newline there is nothing, or a line that a kill cut short.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(value, dict) or not isinstance(value.get(count), int):
            raise ValueError(f"{path} line {number} has no {count}: expected lines written by longnet")
        values[number] = value
    return values


def _check_lines(path: Path, lines: Mapping[int, dict[str, Any]], kinds: Kinds | None) -> None:
    """Raise ValueError for a line that is of none of the ``kinds``."""
    if kinds is None:
        return
    for number, line in lines.items():
        if (fault := _fault(line, kinds)) is not None:
            raise ValueError(f"{path} is damaged: line {number} {fault}. To go on without the line, remove it")


def _fault(line: Mapping[str, Any], kinds: Kinds) -> str | None:
    """The first reason, in words, why a line is of none of the ``kinds``."""
    if "kind" not in line:
        return f"has no 'kind', expected one of {list(kinds)}"
    kind = line["kind"]
    if not isinstance(kind, str) or kind not in kinds:
        return f"has kind={kind!r}, expected one of {list(kinds)}"
    for name, is_right in kinds[kind].items():
        if name not in line:
            return f"({kind}) has no {name!r}"
        if not is_right(line[name]):
            return f"({kind}) has {name}={line[name]!r}"
    return None


def _encode(values: dict[str, Any]) -> bytes:
    return json.dumps(values, allow_nan=False).encode("utf-8") + b"\n"
