"""A run, some bytes, and a stream of the one through the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import make_run

from longnet.reading import StreamResult, StreamSettings, stream
from longnet.training.metrics import read_metrics

CONTENT = bytes((7 * n * n + n // 3) % 251 for n in range(1234))


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of 1,234 bytes."""
    path = tmp_path / "data.bin"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def read(run: Path, file: Path, tmp_path: Path) -> Callable[..., StreamResult]:
    """Stream the file into ``tmp_path / "out"``, with changes to the settings."""

    def call(changes: dict[str, Any] | None = None, **options: Any) -> StreamResult:
        values = {"run": str(run), "data": (str(file),), "out": str(tmp_path / "out"), "chunk": 100, "device": "cpu"}
        return stream(StreamSettings(**{**values, **(changes or {})}), **options)

    return call


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """The record's lines, of one kind if it is given."""

    def get(kind: str | None = None, out: str = "out") -> list[dict[str, Any]]:
        found = read_metrics(tmp_path / out / "stream.jsonl", "position")
        return [line for line in found if kind in (None, line["kind"])]

    return get
