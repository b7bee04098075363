"""Consoles that are not UTF-8: what they cannot show is escaped, and no work is lost."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import make_run

from longnet.cli import entry

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(entry.__file__).parents[2]),
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "120",
    "NO_COLOR": "1",
}
NAME = "caf\u00e9-\u65e5"
Console = Callable[..., "subprocess.CompletedProcess[bytes]"]


# A forked process has its streams already: these are what Python makes of PYTHONIOENCODING when it starts.
LONGNET = """
import os, runpy, sys
encoding = os.environ["PYTHONIOENCODING"]
sys.stdout = open(1, "w", encoding=encoding, errors="strict", closefd=False)
sys.stderr = open(2, "w", encoding=encoding, errors="backslashreplace", closefd=False)
runpy.run_module("longnet", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def console(forked: list[str], tmp_path: Path) -> Console:
    """Run ``longnet`` on a console of an encoding; its output as bytes. ``fresh``: in a Python that starts anew."""

    def run(encoding: str, *arguments: object, fresh: bool = False) -> subprocess.CompletedProcess[bytes]:
        (tmp_path / "program.py").write_text(LONGNET)
        start = [sys.executable, "-m", "longnet"] if fresh else [*forked, str(tmp_path / "program.py")]
        command = [*start, *map(str, arguments)]
        environment = {**ENVIRONMENT, "PYTHONIOENCODING": encoding}
        result = subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False)
        assert result.returncode == 0, result.stderr
        return result

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose name has an accent and an ideograph, with two files of text."""
    path = tmp_path / NAME
    path.mkdir()
    for number in range(2):
        (path / f"{number}.txt").write_text(f"{number} and some more text\n" * 40, encoding="utf-8")
    return path


def test_generate(tmp_path: Path, console: Console) -> None:
    run = make_run(tmp_path / "run")
    result = console("cp1252", "generate", run, "--prompt", NAME, "--tokens", 3, "--device", "cpu")
    assert result.stdout.startswith(b"caf\xe9-\\u65e5")


def test_train(folder: Path, console: Console) -> None:
    (folder / "model.json").write_text('{"preset": "nano", "layers": 1}')
    result = console(
        *("ascii", "train", "--data", folder, "--config", folder / "model.json", "--context", 16, "--steps", 1),
        *("--device", "cpu", "--out", folder.with_name(f"{NAME}-run")),
    )
    assert rb"Reading the folder " in result.stdout and rb"caf\xe9-\u65e5-run/report.html" in result.stdout


def test_stream(tmp_path: Path, folder: Path, console: Console) -> None:
    run = make_run(tmp_path / "run")
    result = console("ascii", "stream", run, "--data", folder, "--out", tmp_path / f"{NAME}-out", "--device", "cpu")
    assert rb"caf\xe9-\u65e5-out" in result.stderr and b"bits per byte" in result.stdout


def test_inspect(folder: Path, console: Console) -> None:
    result = console(
        "cp1252", "inspect", "--segments", "16", "--rates", "1", "--out", folder / "picture.png", fresh=True
    )
    assert b"caf\xe9-\\u65e5" in result.stdout


@pytest.mark.parametrize(("errors", "after"), [("strict", "backslashreplace"), ("replace", "replace")])
def test_a_handler_that_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch, errors: str, after: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=errors)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", None)
    entry._escape_unprintable()
    assert stream.errors == after
