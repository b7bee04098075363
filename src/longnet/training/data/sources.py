"""Where documents come from: files, rows of JSON lines and Parquet, data sets on disk, shards of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longnet.training.data.listing import (
    HELD_OUT_SHARE,
    STDLIB_SKIPPED,
    hash_share,
    is_held_out,
    list_files,
    standard_library,
)
from longnet.training.data.tokenizer import last_line, whole_character

_PIECE = 1 << 24
_ROWS = {".jsonl": "json", ".ndjson": "json", ".jsonl.gz": "json", ".parquet": "parquet"}
"""Files of which every row is a document, and what ``datasets`` calls them."""
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
    """

    content: bytes | np.ndarray
    held_out: bool
    begins: bool = True
    ends: bool = True


@dataclass(frozen=True)
class Source:
    """Documents that are read one after the other, in an order that does not change.

    Attributes:
        place: the file or folder.
        state: what changes when the files do: names, sizes, times of the last change.
        total: bytes of the files, for the progress.
        split: how documents are held out, in words.
        pieces: reads them from the beginning; each time anew.
    """

    place: Path
    state: tuple[tuple[str, int, int], ...]
    total: int
    split: str
    pieces: Callable[[], Iterator[Piece]]


def find_source(path: Path | None, field: str, say: Callable[[str], None]) -> Source:
    """What is to be read at ``path``; None for the source code of Python's standard library.

    Args:
        path: a file or a folder; a folder of ``datasets.save_to_disk``; files of token shards (``.bin``, uint16, those of nanoGPT
            or llm.c; the names of held-out ones hold ``val``).
        field: which field of a row is its text.
        say: called with a line of text for everything that is not read.

    Raises:
        ValueError: nothing there, or too little to hold something out.
        OSError: what cannot be read.
    """
    if path is None:
        root = standard_library()
        say(f"Reading the Python standard library's source in {root}")
        return _of_files(root, list_files(root, suffix=".py", skipped=STDLIB_SKIPPED, say=say), field)
    root = path
    if root.is_file():
        say(f"Reading the file {root}")
        return _of_one_file(root) if _kind(root) is None else _of_rows(root, [root.name], field)
    if not root.is_dir():
        what = "a pipe or a device" if root.exists() else "not there"
        raise ValueError(f"data={str(path)!r} is {what}: expected a file or a folder of text")
    say(f"Reading the folder {root}")
    names = list_files(root, say=say)
    if "prepared.json" in names:
        raise ValueError(f"data={str(path)!r} is prepared already: expected text")
    if "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= set(names):
        return _of_data_set(root, names, field)
    if shards := [name for name in names if name.endswith(".bin")]:
        if others := [name for name in names if name not in shards]:
            raise ValueError(
                f"data={str(path)!r} holds shards of tokens, such as {shards[0]}, and other files, such as {others[0]}: "
                "expected a folder of one kind"
            )
        return _of_shards(root, names)
    return (_of_rows if any(_kind(root / name) for name in names) else _of_files)(root, names, field)


def _kind(path: Path) -> str | None:
    """What ``datasets`` calls a file of rows; None for any other."""
    return next((kind for suffix, kind in _ROWS.items() if path.name.lower().endswith(suffix)), None)


def _source(root: Path, names: list[str], split: str, pieces: Callable[[], Iterator[Piece]]) -> Source:
    states = [(name, (root / name).stat()) for name in names]
    state = tuple((name, one.st_size, one.st_mtime_ns) for name, one in states)
    return Source(root, state, sum(size for _, size, _ in state), split, pieces)


def _of_files(root: Path, names: list[str], field: str) -> Source:
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
    sizes = {name: (root / name).stat().st_size for name in names}

    def pieces() -> Iterator[Piece]:
        for name, size in sizes.items():
            yield from _pieces(root / name, name in held_out, 0, size)

    return _source(root, names, split, pieces)


def _of_one_file(path: Path) -> Source:
    size = path.stat().st_size
    cut = size - int(size * HELD_OUT_SHARE)
    with open(path, "rb") as file:
        file.seek(max(0, cut - 4))
        cut += whole_character(file.read(min(4, cut)), min(4, cut)) - min(4, cut)
    if size - cut < 2:
        raise ValueError(f"data={str(path)!r} holds {size} bytes: expected at least 20, the last tenth is held out")

    def pieces() -> Iterator[Piece]:
        yield from _pieces(path, False, 0, cut)
        yield from _pieces(path, True, cut, size)

    found = _source(path.parent, [path.name], "one file: its last tenth is held out", pieces)
    return Source(path, found.state, found.total, found.split, pieces)


def _pieces(path: Path, held_out: bool, start: int = 0, stop: int | None = None) -> Iterator[Piece]:
    """The bytes of a file, cut where :func:`cut_text` would."""
    stop = path.stat().st_size if stop is None else stop
    with open(path, "rb") as file:
        file.seek(start)
        begins, rest, left = True, b"", stop - start
        while left:
            new = file.read(min(_PIECE, left))
            if not new:
                raise ValueError(f"{path} has become shorter while it was read: {left:,} bytes are missing")
            left -= len(new)
            content = rest + new
            end = (
                (last_line(content, 0, len(content)) or whole_character(content, len(content)))
                if left
                else len(content)
            )
            yield Piece(content[:end], held_out, begins, not left)
            begins, rest = False, content[end:]


def _of_rows(root: Path, names: list[str], field: str) -> Source:
    """Every row of some files is a document, and every other file one."""
    import datasets  # type: ignore[import-untyped]

    folder = root.parent if root.is_file() else root

    def pieces() -> Iterator[Piece]:
        for name in names:
            kind = _kind(folder / name)
            if kind is None:
                yield from _pieces(folder / name, is_held_out(name))
                continue
            if set("*?[") & set(name):
                raise ValueError(
                    f"{folder / name} has a name that datasets takes for a pattern: expected none of * ? ["
                )
            rows = datasets.load_dataset(kind, data_files=str(folder / name), split="train", streaming=True)
            for number, row in enumerate(rows):
                yield Piece(_text_of(row, field, f"{folder / name}, row {number}"), is_held_out(f"{name}:{number}"))

    split = "by row: a hash of file and row, 1 row in 10 held out"
    found = _source(folder, names, split, pieces)
    return Source(root, found.state, found.total, split, pieces)


def _of_data_set(root: Path, names: list[str], field: str) -> Source:
    """What ``datasets.save_to_disk`` has written: one data set, or several splits."""
    import datasets

    found = datasets.load_from_disk(str(root))
    splits = dict(found) if isinstance(found, dict) else {"": found}
    given = [name for name in splits if name.lower() in _HELD_OUT_SPLITS]

    def pieces() -> Iterator[Piece]:
        for name, rows in splits.items():
            for number, row in enumerate(rows):
                held_out = name in given if given else is_held_out(f"{name}:{number}")
                yield Piece(_text_of(row, field, f"{root}, row {number} {name}".rstrip()), held_out)

    split = (
        f"by the data set: {', '.join(given)} held out"
        if given
        else "by row: a hash of its number, 1 row in 10 held out"
    )
    return _source(root, names, split, pieces)


def _text_of(row: dict[str, Any], field: str, where: str) -> bytes:
    text = row.get(field)
    if not isinstance(text, str):
        raise ValueError(f"field={field!r}: {where} has {_fields(row)}, expected a text of this name")
    return text.encode("utf-8", "surrogatepass")


def _fields(row: dict[str, Any]) -> str:
    return ", ".join(f"{name!r} ({type(value).__name__})" for name, value in row.items())


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
                    yield Piece(np.frombuffer(content, dtype=dtype), name in held_out, begins, False)
                    begins = False

    return _source(root, names, "by shard: those with 'val' in the name are held out", pieces)
