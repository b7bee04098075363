"""What Windows refuses and a POSIX system does not, put in its place: runs and streams need none of it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import make_run

from longnet.reading import StreamSettings, stream
from longnet.training import TrainSettings, files, load_model, lock, train, write_report
from longnet.training.files import write_bytes

# What its os and signal lack.
ABSENT_OS = ("fork", "sync", "pread", "pwrite", "mkfifo", "O_DIRECTORY", "O_NOFOLLOW")
ABSENT_SIGNALS = ("SIGKILL", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "SIGSTOP", "SIGCONT")


def _is_open(path: Path) -> bool:
    """Whether this process has the file open or mapped; False where the system does not tell."""
    target = os.path.realpath(path)
    try:
        opened = {os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")}
        return target in opened or target in Path("/proc/self/maps").read_text(errors="replace")
    except OSError:
        return False


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, replace, unlink, open_file = os.fsync, os.replace, os.unlink, os.open

    def fsync_writable(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(descriptor)

    def replace_closed(source: Path, target: Path) -> None:
        if _is_open(source) or _is_open(target):
            raise PermissionError(errno.EACCES, "Access is denied", str(source), 5, str(target))
        replace(source, target)

    def unlink_closed(path: Path, *arguments: Any, **named: Any) -> None:
        if os.path.exists(path) and _is_open(path):
            raise PermissionError(errno.EACCES, "The process cannot access the file", str(path))
        unlink(path, *arguments, **named)

    def open_no_folder(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_file(path, flags, *arguments, **named)

    monkeypatch.setattr(os, "fsync", fsync_writable)
    monkeypatch.setattr(os, "replace", replace_closed)
    monkeypatch.setattr(os, "unlink", unlink_closed)
    monkeypatch.setattr(os, "open", open_no_folder)
    for name in ABSENT_OS:
        monkeypatch.delattr(os, name, raising=False)
    for name in ABSENT_SIGNALS:
        monkeypatch.delattr(signal, name, raising=False)
    monkeypatch.setattr(files, "_WINDOWS", True)
    monkeypatch.setattr(lock, "fcntl", None)
    locks = SimpleNamespace(locking=lambda descriptor, mode, count: None, LK_NBLCK=2, LK_UNLCK=0)
    monkeypatch.setitem(sys.modules, "msvcrt", locks)
    monkeypatch.setitem(sys.modules, "resource", None)


@pytest.mark.usefixtures("windows")
def test_a_run_its_report_and_a_stream(make_settings: Callable[..., TrainSettings], tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(b"some text to learn by heart. " * 200)
    settings = make_settings(steps=4, eval_every=2, save_every=1, data=str(tmp_path / "one.txt"))
    asked = iter([False, False, True])
    assert train(settings, should_stop=lambda: next(asked)).step == 2
    assert train(settings, resume=True).step == 4
    write_report(settings.out)
    assert load_model(settings.out).config == settings.model
    reading = StreamSettings(
        run=settings.out, data=(str(tmp_path / "one.txt"),), out=str(tmp_path / "out"), chunk=500, save_every=0.0
    )
    assert stream(reading).position == 29 * 200
    assert stream(reading, resume=True).finished


@pytest.mark.usefixtures("windows")
def test_a_finished_model_is_read_without_staying_open(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    model = load_model(run)
    assert not _is_open(run / "model.safetensors")
    assert model.config.layers == 2


def _refuse(times: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let the next renames fail; returns how long was waited between them."""
    replace, waits, left = os.replace, [], iter(range(times))

    def refuse(source: Path, target: Path) -> None:
        if next(left, None) is not None:
            raise PermissionError(errno.EACCES, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(files, "_WINDOWS", True)
    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def test_a_rename_over_an_open_file_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")
    waits = _refuse(3, monkeypatch)
    write_bytes(file, b"new")
    assert file.read_bytes() == b"new" and len(waits) == 3


def test_a_rename_that_stays_refused_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")
    _refuse(100, monkeypatch)
    with pytest.raises(PermissionError, match="Access is denied"):
        write_bytes(file, b"new")
    assert file.read_bytes() == b"old" and [path.name for path in tmp_path.iterdir()] == ["file"]
