"""Atomic writes: a file is written beside its target, flushed to disk, then renamed to it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_WINDOWS = os.name == "nt"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file in the folder of ``path``, then rename it to ``path``.

    After a kill at any moment ``path`` is the old file or the new one. The temporary name is fixed, so the next write
    overwrites what a kill leaves behind.

    Raises:
        OSError: raised by the write (a full disk, for example); ``path`` is unchanged and the temporary file gone.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write(temporary)
        # Opened for writing: Windows flushes no other file.
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        _replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content``, atomically."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically. Bytes of a path that are not UTF-8 are written as ``\\udc..``."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: not a JSON object; the message names the file.
        OSError: the file cannot be read.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}: expected an object")
    return value


def read_into(file: Any, buffer: memoryview) -> int:
    """Fill ``buffer`` from a file or a pipe; return the number of bytes read, fewer than its size at the end."""
    done = 0
    while done < len(buffer) and (count := file.readinto(buffer[done:])):
        done += count
    return done


def _replace(temporary: Path, path: Path) -> None:
    # Windows refuses while another program (a virus scanner, a reader of the model) has the file open for a moment.
    for seconds in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6) if _WINDOWS else ():
        try:
            os.replace(temporary, path)
            return
        except PermissionError:
            time.sleep(seconds)
    os.replace(temporary, path)


def _flush_folder(folder: Path) -> None:
    if _WINDOWS:  # Windows cannot open a folder; its rename is durable by itself.
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
