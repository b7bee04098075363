"""Bytes of files and pipes in their order, from any position."""

from __future__ import annotations

import io
import os
from contextlib import closing
from pathlib import Path

import pytest

from longnet.reading.source import ByteSource, FileBytes, PipedBytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "folder"
    (root / "b").mkdir(parents=True)
    (root / "b" / "first.txt").write_bytes(b"0123")
    (root / "c.txt").write_bytes(b"4")
    (root / "d.txt").write_bytes(b"56789")
    (root / "empty.txt").touch()
    (root / ".hidden").write_bytes(b"not read")
    return root


def _rest(source: ByteSource, size: int) -> list[bytes]:
    chunks = []
    buffer = bytearray(size)
    while count := source.read_into(memoryview(buffer)):
        chunks.append(bytes(buffer[:count]))
    source.close()
    return chunks


def test_chunks_span_files_in_the_order_given(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alone").write_bytes(b"AB")
    source = FileBytes([str(tmp_path / "alone"), str(folder), str(tmp_path / "alone")])
    assert (source.total, source.files) == (14, 5)
    assert _rest(source, 5) == [b"AB012", b"34567", b"89AB"]


@pytest.mark.parametrize("position", range(11))
def test_reading_starts_anywhere(folder: Path, position: int) -> None:
    source = FileBytes([str(folder)])
    source.start_at(position, source.fingerprint())
    assert b"".join(_rest(source, 3)) == b"0123456789"[position:]


def test_other_names_or_sizes_are_other_data(folder: Path, tmp_path: Path) -> None:
    before = FileBytes([str(folder)]).fingerprint()
    moved = folder.rename(tmp_path / "moved")
    with closing(FileBytes([str(moved)])) as source:
        source.start_at(3, before)
    (moved / "c.txt").write_bytes(b"44")
    with pytest.raises(ValueError, match="their relative paths or sizes differ"):
        FileBytes([str(moved)]).start_at(3, before)


def test_a_file_that_shrinks_is_not_padded(folder: Path) -> None:
    source = FileBytes([str(folder)])
    (folder / "d.txt").write_bytes(b"5")
    with (
        closing(source),
        pytest.raises(ValueError, match=r"d\.txt has become shorter while it was read: 4 bytes are missing"),
    ):
        _rest(source, 4)


def test_a_pipe_that_gives_a_byte_at_a_time_fills_chunks() -> None:
    class Slow(io.BytesIO):
        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            return super().readinto(buffer[:1])

    assert _rest(PipedBytes(Slow(b"0123456789")), 4) == [b"0123", b"4567", b"89"]


def test_a_pipe_goes_on_only_with_the_bytes_it_had() -> None:
    first = PipedBytes(io.BytesIO(b"0123456789"))
    first.read_into(memoryview(bytearray(4)))
    again = PipedBytes(io.BytesIO(b"0123456789"))
    again.start_at(4, first.fingerprint())
    assert again.fingerprint() == first.fingerprint()
    assert b"".join(_rest(again, 4)) == b"456789"
    with pytest.raises(ValueError, match="the first 4 bytes of standard input are not those"):
        PipedBytes(io.BytesIO(b"0193456789")).start_at(4, first.fingerprint())
    with pytest.raises(ValueError, match="standard input ended after 3 bytes, before the saved position 4"):
        PipedBytes(io.BytesIO(b"012")).start_at(4, first.fingerprint())


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gone' is not there: expected a file or a folder"):
        FileBytes([str(tmp_path / "gone")])
    with pytest.raises(ValueError, match="hold no bytes"):
        FileBytes([str(tmp_path)])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is a pipe or a device"):
        FileBytes([str(tmp_path / "pipe")])
