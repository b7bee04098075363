"""One process at a time writes into a folder. The system releases the lock when its process ends, however that happens."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has msvcrt instead.
    fcntl = None  # type: ignore[assignment]

_NAME = ".lock"
# On Windows no process can read a locked byte: the lock is on a byte after the process number.
_LOCKED_BYTE = 1 << 20
_TAKEN = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)


class InUse(ValueError):
    """Another process holds the lock."""


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold the lock on ``folder``. A missing folder is made, and removed again if it stays empty.

    Raises:
        InUse: another process holds the lock. ValueError: ``folder`` is a file, or lies in one.
        OSError: the folder cannot be made or written to.
    """
    path = Path(folder)
    there = next((one for one in (path, *path.parents) if one.exists()), path)
    if there.exists() and not there.is_dir():
        what = "is a file" if there == path else f"lies in {str(there)!r}, a file"
        raise ValueError(f"out={str(folder)!r} {what}: expected a folder to be made")
    made = [one for one in (path, *path.parents) if not one.exists()]
    try:
        file = _open_locked(path)
        try:
            file.truncate(0)
            file.write(str(os.getpid()).encode())
            yield
        finally:
            _remove(path / _NAME, file)
    finally:
        with suppress(OSError):
            for one in made:
                one.rmdir()


def _open_locked(folder: Path) -> FileIO:
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"{error.strerror}. Expected a folder that can be made and written"
            raise OSError(error.errno, reason, str(folder)) from None
        name = folder / _NAME
        try:
            file = FileIO(name, "a+")
        except FileNotFoundError:
            continue  # The process that had made the folder has just removed it.
        try:
            _lock(file)
        except OSError as error:
            if error.errno not in _TAKEN:
                text = f"the file system of {str(folder)!r} has no locks ({error}): another process may write there too"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
                return file
            file.seek(0)
            number = file.read(20).decode("ascii", "replace")
            file.close()
            raise InUse(
                f"out={str(folder)!r} is in use by another process{f' ({number})' if number else ''}: "
                "expected one process at a time in a folder; wait for it, or choose another folder"
            ) from None
        # The previous holder may have removed the file after it was opened here: other processes would not see this lock.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(name)):
                return file
        file.close()


def _lock(file: FileIO) -> None:
    """Lock or raise OSError at once."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    _windows_locking(file, "LK_NBLCK")


def _windows_locking(file: FileIO, mode: str) -> None:
    import msvcrt

    locks: Any = msvcrt
    file.seek(_LOCKED_BYTE)
    locks.locking(file.fileno(), getattr(locks, mode), 1)
    file.seek(0)


def _remove(name: Path, file: FileIO) -> None:
    """Remove the lock's file; before releasing the lock where the system can remove an open file."""
    if fcntl is not None:
        name.unlink(missing_ok=True)
        file.close()
        return
    _windows_locking(file, "LK_UNLCK")
    file.close()
    with suppress(OSError):  # Another process has opened it by now.
        name.unlink()
