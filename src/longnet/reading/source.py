"""Sources of bytes: files one after the other, or standard input. Neither is held in memory whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Protocol

from longnet.training.data import list_files
from longnet.training.files import read_into

_SKIP = 1 << 20


class ByteSource(Protocol):
    """A stream of bytes that is read once, from a position on.

    Attributes:
        total: bytes in all; None if not known before reading.
        files: how many files they come from.
    """

    total: int | None
    files: int

    def start_at(self, position: int, fingerprint: str | None) -> None:
        """Go to ``position``, once and before any reading. ``fingerprint`` is the one taken there, None at the start.

        Raises:
            ValueError: the bytes are not those of the fingerprint.
        """

    def read_into(self, buffer: memoryview) -> int:
        """Fill ``buffer`` and return the number of bytes read; fewer than its size (0 at last) mean the end."""

    def fingerprint(self) -> str:
        """SHA-256 (hex) by which a later ``start_at`` knows that the bytes are the same."""

    def close(self) -> None:
        """Close open files."""


@dataclass(frozen=True)
class DataFile:
    """One file: where it is, its name below the path that was given, and its bytes."""

    path: Path
    name: str
    size: int


class FileBytes:
    """Files and folders in the order given, a folder's files by sorted relative path; no separator between them.

    The fingerprint covers relative paths and sizes, not contents: the data may be moved.

    Args:
        paths: files and folders.
        say: called with a line of text for everything in a folder that is not read, see ``list_files``.

    Raises:
        ValueError: a path that is neither a file nor a folder, or nothing to read at all.
        OSError: a folder that cannot be read.
    """

    def __init__(self, paths: Sequence[str], say: Callable[[str], None] | None = None) -> None:
        self._files = [file for path in paths for file in _files_of(Path(path), say)]
        self.total: int | None = sum(file.size for file in self._files)
        self.files = len(self._files)
        if not self.total:
            raise ValueError(f"data={list(paths)} hold no bytes: expected at least 2")
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(f"{file.name}\0{file.size}\0".encode("utf-8", "surrogateescape"))
        self._fingerprint = digest.hexdigest()
        self._next, self._left = 0, 0
        self._open: FileIO | None = None

    def start_at(self, position: int, fingerprint: str | None) -> None:
        if fingerprint is not None and fingerprint != self.fingerprint():
            raise ValueError(
                "the data are not those of the saved stream: their relative paths or sizes differ. Expected the same data"
            )
        while position > 0:
            position -= self._files[self._next].size
            self._next += 1
        if position < 0:
            self._next -= 1
            self._open_next()
            assert self._open is not None
            skipped = self._left + position
            self._open.seek(skipped)
            self._left -= skipped

    def read_into(self, buffer: memoryview) -> int:
        filled = 0
        while filled < len(buffer):
            if not self._left:
                if self._next == len(self._files):
                    break
                self._open_next()
            assert self._open is not None
            count = self._open.readinto(buffer[filled : filled + self._left])
            if not count:
                raise ValueError(
                    f"{self._open.name} has become shorter while it was read: {self._left:,} bytes are missing"
                )
            filled += count
            self._left -= count
        return filled

    def fingerprint(self) -> str:
        return self._fingerprint

    def close(self) -> None:
        if self._open is not None:
            self._open.close()

    def _open_next(self) -> None:
        self.close()
        file = self._files[self._next]
        self._open = FileIO(file.path)
        self._next, self._left = self._next + 1, file.size


class PipedBytes:
    """Standard input, or any other open binary file. It cannot seek: to resume, pipe the same bytes in again.

    The fingerprint covers every byte read so far.
    """

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe
        self._digest = hashlib.sha256()
        self.total: int | None = None
        self.files = 1

    def start_at(self, position: int, fingerprint: str | None) -> None:
        buffer = memoryview(bytearray(min(_SKIP, position)))
        left = position
        while left:
            count = self.read_into(buffer[:left])
            if not count:
                raise ValueError(
                    f"standard input ended after {position - left:,} bytes, before the saved position {position:,}: "
                    "expected the same stream from its start"
                )
            left -= count
        if fingerprint is not None and fingerprint != self.fingerprint():
            raise ValueError(
                f"the first {position:,} bytes of standard input are not those that were read before: expected the same stream"
            )

    def read_into(self, buffer: memoryview) -> int:
        filled = read_into(self._pipe, buffer)
        self._digest.update(buffer[:filled])
        return filled

    def fingerprint(self) -> str:
        return self._digest.hexdigest()

    def close(self) -> None:
        pass


def _files_of(path: Path, say: Callable[[str], None] | None) -> list[DataFile]:
    if path.is_file():
        return [DataFile(path, path.name, path.stat().st_size)] if path.stat().st_size else []
    if path.is_dir():
        return [DataFile(path / name, name, (path / name).stat().st_size) for name in list_files(path, say=say)]
    if path.exists():
        raise ValueError(
            f"data={str(path)!r} is a pipe or a device: expected a file or a folder, or it piped in and '-'"
        )
    raise ValueError(f"data={str(path)!r} is not there: expected a file or a folder, or '-' for standard input")
