"""Where documents come from: files, rows of JSON lines and Parquet, data sets on disk, shards of tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from longnet.training.data.listing import (
    HELD_OUT_SHARE,
    STDLIB_SKIPPED,
    hash_share,
    is_held_out,
    list_files,
    standard_library,
)
from longnet.training.data.rows import (
    COMPRESSED,
    BadRows,
    is_archive,
    is_compressed,
    json_rows,
    kind_of,
    opened,
    parquet_rows,
)

_PIECE = 1 << 24
_HELD_OUT_SPLITS = ("validation", "valid", "val", "dev", "eval", "test")
_SHARD_TYPES, _SHARD_HEADER = (
    {20240520: "<u2", 20240801: "<u4"},
    1024,
)  # llm.c: 256 int32, the first names the type


@dataclass(frozen=True)
class Piece:
    """A part of a document, at most 16 MiB; a document is its pieces one after the other.

    Attributes:
        content: bytes, or tokens already.
        held_out: to which part it belongs.
        begins: whether a document begins with it.
        ends: whether its document ends with it.
        name: of the file, for messages.
    """

    content: bytes | np.ndarray
    held_out: bool
    begins: bool = True
    ends: bool = True
    name: str = ""


@dataclass(frozen=True)
class Source:
    """Documents that are read one after the other, in an order that does not change.

    Attributes:
        place: the file or folder.
        state: what changes when the files do: names, sizes, times of the last change.
        total: bytes of their text, for the progress; 0 where only reading tells.
        split: how documents are held out, in words.
        pieces: reads them from the beginning; each time anew.
        bad_rows: what the last reading has left out.
    """

    place: Path
    state: tuple[tuple[str, int, int], ...]
    total: int
    split: str
    pieces: Callable[[], Iterator[Piece]]
    bad_rows: BadRows = field(default_factory=lambda: BadRows("", False))


def find_source(path: Path | None, text_field: str, say: Callable[[str], None], skip_bad_rows: bool = False) -> Source:
    """What is to be read at ``path``; None for the source code of Python's standard library.

    Args:
        path: a file or a folder; a folder of ``datasets.save_to_disk``; files of token shards (``.bin``, uint16, those of nanoGPT
            or llm.c; the names of held-out ones hold ``val``).
        text_field: which field of a row is its text.
        say: called with a line of text for everything that is not read.
        skip_bad_rows: leave out and count rows without such a text, instead of a ValueError by the reading.

    Raises:
        ValueError: nothing there, an archive, or too little to hold something out.
        OSError: what cannot be read.
    """
    if path is None:
        root = standard_library()
        say(f"Reading the Python standard library's source in {root}")
        return _of_files(root, list_files(root, suffix=".py", skipped=STDLIB_SKIPPED, say=say))
    root, bad = path, BadRows(text_field, skip_bad_rows)
    if root.is_file():
        if is_archive(root.name):
            raise ValueError(
                f"data={str(path)!r} is an archive: expected it unpacked, or one of text alone ({', '.join(COMPRESSED)})"
            )
        say(f"Reading the file {root}")
        return _of_one_file(root) if kind_of(root) is None else _of_rows(root, [root.name], bad)
    if not root.is_dir():
        what = "a pipe or a device" if root.exists() else "not there"
        raise ValueError(f"data={str(path)!r} is {what}: expected a file or a folder of text")
    say(f"Reading the folder {root}")
    names = list_files(root, say=say)
    if "prepared.json" in names:
        raise ValueError(f"data={str(path)!r} is prepared already: expected text")
    if "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= set(names):
        return _of_data_set(root, names, bad)
    for name in filter(is_archive, names):
        say(f"Not read: {root / name} is an archive")
    names = [name for name in names if not is_archive(name)]
    if shards := [name for name in names if name.endswith(".bin")]:
        if others := [name for name in names if name not in shards]:
            raise ValueError(
                f"data={str(path)!r} holds shards of tokens, such as {shards[0]}, and other files, such as {others[0]}: "
                "expected a folder of one kind"
            )
        return _of_shards(root, names)
    return _of_rows(root, names, bad) if any(kind_of(root / name) for name in names) else _of_files(root, names)


def whole_character(text: bytes, place: int) -> int:
    """The place, or that of the UTF-8 character which it would cut."""
    for first in range(place - 1, max(place - 4, -1), -1):
        if text[first] >= 0xC0:
            length = 2 + (text[first] >= 0xE0) + (text[first] >= 0xF0)
            return first if first + length > place else place
        if text[first] < 0x80:
            break
    return place


def _source(root: Path, names: list[str], split: str, pieces: Callable[[], Iterator[Piece]]) -> Source:
    folder = root.parent if root.is_file() else root
    states = [(name, (folder / name).stat()) for name in names]
    state = tuple((name, one.st_size, one.st_mtime_ns) for name, one in states)
    hidden = any(is_compressed(folder / name) or kind_of(folder / name) == "parquet" for name in names)
    return Source(root, state, 0 if hidden else sum(size for _, size, _ in state), split, pieces)


def _of_files(root: Path, names: list[str]) -> Source:
    """Every file is a document."""
    if len(names) < 2:
        raise ValueError(
            f"data={str(root)!r} holds {len(names)} non-empty file(s): expected at least two, "
            "one to train on and one to hold out (or give the path of a single file)"
        )
    held_out = {name for name in names if is_held_out(name)}
    split = "by file: a hash of the relative path, 1 file in 10 held out"
    if not held_out or len(held_out) == len(names):
        held_out = {min(names, key=hash_share)}
        split = "by file: the one file whose relative path has the lowest hash is held out"
    source = _source(root, names, split, lambda: iter(()))
    sizes = {name: size for name, size, _ in source.state}

    def pieces() -> Iterator[Piece]:
        for name, size in sizes.items():
            yield from _file_pieces(root / name, name in held_out, size)

    return replace(source, pieces=pieces)


def _of_one_file(path: Path) -> Source:
    with opened(path) as file:
        size = file.seek(0, os.SEEK_END)
        cut = size - int(size * HELD_OUT_SHARE)
        first = file.seek(max(0, cut - 4))
        cut = first + whole_character(file.read(cut - first), cut - first)
    if size - cut < 2:
        raise ValueError(f"data={str(path)!r} holds {size} bytes: expected at least 20, the last tenth is held out")

    def pieces() -> Iterator[Piece]:
        with opened(path) as file:
            yield from _pieces(path, file, False, cut)
            yield from _pieces(path, file, True, size - cut)

    return replace(_source(path, [path.name], "one file: its last tenth is held out", pieces), total=size)


def _file_pieces(path: Path, held_out: bool, size: int) -> Iterator[Piece]:
    with opened(path) as file:
        yield from _pieces(path, file, held_out, None if is_compressed(path) else size)


def _pieces(path: Path, file: BinaryIO, held_out: bool, size: int | None) -> Iterator[Piece]:
    """The next ``size`` bytes of an open file, or all for None, in pieces that cut no character."""
    begins, ends, rest, done = True, False, b"", 0
    following = file.read(_PIECE) if size is None else b""
    while not ends:
        if size is None:
            new, following = following, file.read(_PIECE)
            ends = not following
        else:
            new = file.read(min(_PIECE, size - done))
            done += len(new)
            ends = done == size
            if not new:
                raise ValueError(f"{path} has become shorter while it was read: {size - done:,} bytes are missing")
        content = rest + new
        place = len(content) if ends else whole_character(content, len(content))
        if content or not begins:
            yield Piece(content[:place], held_out, begins, ends, str(path))
        begins, rest = False, content[place:]


def _of_rows(root: Path, names: list[str], bad: BadRows) -> Source:
    """Every row of some files is a document, and every other file one."""
    folder = root.parent if root.is_file() else root
    readers = {"json": json_rows, "parquet": parquet_rows}

    def pieces() -> Iterator[Piece]:
        bad.clear()
        for name in names:
            path, kind = folder / name, kind_of(folder / name)
            if kind is None:
                yield from _file_pieces(path, is_held_out(name), path.stat().st_size)
                continue
            for number, text in readers[kind](path, bad):
                yield Piece(text, is_held_out(f"{name}:{number}"), name=str(path))

    split = "by row: a hash of file and row, 1 row in 10 held out"
    return replace(_source(root, names, split, pieces), bad_rows=bad)


def _of_data_set(root: Path, names: list[str], bad: BadRows) -> Source:
    """What ``datasets.save_to_disk`` has written: one data set, or several splits."""
    import datasets  # type: ignore[import-untyped]

    found = datasets.load_from_disk(str(root))
    splits = dict(found) if isinstance(found, dict) else {"": found}
    given = [name for name in splits if name.lower() in _HELD_OUT_SPLITS]

    def pieces() -> Iterator[Piece]:
        bad.clear()
        for name, rows in splits.items():
            for number, row in enumerate(rows):
                where = f"{root}, row {number + 1} {name}".rstrip()
                if (text := bad.text_of(row, where)) is not None:
                    yield Piece(text, name in given if given else is_held_out(f"{name}:{number}"), name=where)

    split = (
        f"by the data set: {', '.join(given)} held out"
        if given
        else "by row: a hash of its number, 1 row in 10 held out"
    )
    return replace(_source(root, names, split, pieces), bad_rows=bad)


def _of_shards(root: Path, names: list[str]) -> Source:
    held_out = {name for name in names if "val" in Path(name).name}
    if not held_out or len(held_out) == len(names):
        raise ValueError(
            f"data={str(root)!r} holds {names[:3]}: expected shards to train on and some with 'val' in the name"
        )

    def pieces() -> Iterator[Piece]:
        for name in names:
            with open(root / name, "rb") as file:
                kind = _SHARD_TYPES.get(int.from_bytes(file.read(4), "little"))
                file.seek(0 if kind is None else _SHARD_HEADER)
                begins = True
                while content := file.read(_PIECE):
                    dtype = np.dtype(kind or "<u2")
                    if len(content) % dtype.itemsize:
                        raise ValueError(f"{root / name} is no shard of {dtype.name}: it holds half a token")
                    yield Piece(np.frombuffer(content, dtype=dtype), name in held_out, begins, False, str(root / name))
                    begins = False

    return _source(root, names, "by shard: those with 'val' in the name are held out", pieces)
