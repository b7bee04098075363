"""One process at a time in a folder: the second one is told so, and a killed one leaves no lock behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longnet.models import LongNetConfig, LongNetLM
from longnet.reading import StreamSettings, stream
from longnet.training import TrainSettings, load_model, save_model, train, write_report
from longnet.training import lock as module
from longnet.training.lock import locked

Make = Callable[..., TrainSettings]
HOLDS = """
import os, sys, time
from longnet.training.lock import locked
with locked(sys.argv[1]):
    print(os.getpid(), flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path, forked: list[str]) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that holds the lock on ``tmp_path / "out"``, and its number. It ends as what started it does."""
    (tmp_path / "holds.py").write_text(HOLDS)
    process = subprocess.Popen(
        [*forked, str(tmp_path / "holds.py"), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])},
    )
    assert process.stdout is not None
    yield process, int(process.stdout.readline())
    process.kill()
    process.communicate()


def test_the_folder_is_made_and_left_only_with_content(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b"):
        assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == [".lock"]
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == ["file"]


def test_what_writes_into_a_folder_says_who_has_it(
    tmp_path: Path, holder: tuple[subprocess.Popen[str], int], make_settings: Make
) -> None:
    out = tmp_path / "out"
    save_model(LongNetLM(LongNetConfig.preset("nano")), tmp_path / "model")
    (tmp_path / "file").write_bytes(b"some text")
    settings = StreamSettings(run=str(tmp_path / "model"), data=(str(tmp_path / "file"),), out=str(out), device="cpu")
    (out / "run.json").touch()
    for call in (
        lambda: train(make_settings(out=str(out))),
        lambda: train(make_settings(out=str(out)), resume=True),
        lambda: write_report(out),
        lambda: stream(settings),
        lambda: save_model(load_model(tmp_path / "model"), out),
    ):
        with pytest.raises(ValueError, match=rf"out' is in use by another process \({holder[1]}\)"):
            call()
    assert sorted(file.name for file in out.iterdir()) == [".lock", "run.json"]


def test_a_killed_process_leaves_no_lock(tmp_path: Path, holder: tuple[subprocess.Popen[str], int]) -> None:
    process, number = holder
    os.kill(number, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (tmp_path / "out" / ".lock").exists()
    with locked(tmp_path / "out"):
        pass
    assert not (tmp_path / "out" / ".lock").exists()


def test_a_lock_on_a_removed_file_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process before removes its file after the next one has opened it: that one has to open the new file."""
    lock, taken = module._lock, []

    def remove_first(file: Any) -> None:
        if not taken:
            (tmp_path / ".lock").unlink()
        taken.append(os.fstat(file.fileno()).st_ino)
        lock(file)

    monkeypatch.setattr(module, "_lock", remove_first)
    with locked(tmp_path):
        assert len(taken) == 2
        assert (tmp_path / ".lock").stat().st_ino == taken[-1]


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module, "_lock", refuse)
    with pytest.warns(RuntimeWarning, match="has no locks .*: another process may write there too"), locked(tmp_path):
        (tmp_path / "file").touch()
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_windows_locks_a_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module locks from where the file stands, by descriptor, and raises EACCES; an open file cannot be removed."""
    held: set[tuple[int, int]] = set()

    def locking(descriptor: int, mode: int, count: int) -> None:
        place = (os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR))
        assert count == 1
        if mode == 0:
            held.remove(place)
        elif place in held:
            raise PermissionError(errno.EACCES, "Permission denied")
        else:
            held.add(place)

    monkeypatch.setattr(module, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2, LK_UNLCK=0))
    with locked(tmp_path):
        with pytest.raises(ValueError, match=rf"in use by another process \({os.getpid()}\)"), locked(tmp_path):
            pass
        # The number stays readable: the byte that is locked lies behind it.
        assert all(place > 20 for _, place in held)
    assert not held and list(tmp_path.iterdir()) == []
