"""Where documents come from: files, rows of JSON lines and Parquet, data sets on disk, shards of tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
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
    is_shard,
    json_rows,
    kind_of,
    opened,
    parquet_rows,
    unreadable_reason,
)

_PIECE = 1 << 24
_SAVED, _SPLITS = ("state.json", "dataset_info.json"), "dataset_dict.json"  # What datasets writes beside Arrow files.
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
        is_tokens: whether the documents are tokens already.
        bad_rows: what the last reading has left out.
    """

    place: Path
    state: tuple[tuple[str, int, int], ...]
    total: int
    split: str
    pieces: Callable[[], Iterator[Piece]]
    is_tokens: bool = False
    bad_rows: BadRows = field(default_factory=lambda: BadRows("", False))


def find_source(path: Path | None, text_field: str, say: Callable[[str], None], skip_bad_rows: bool = False) -> Source:
    """What is to be read at ``path``; None for the source code of Python's standard library.

    Args:
        path: a file or a folder; a folder of ``datasets.save_to_disk``; token shards (``.bin``, uint16, those of nanoGPT
            or llm.c; the names of held-out ones hold ``val``, of a single one the last tenth is held out).
        text_field: which field of a row is its text.
        say: called with a line of text for everything that is not read.
        skip_bad_rows: leave out and count rows without such a text, instead of a ValueError by the reading.

    Raises:
        ValueError: nothing there, an archive, too little to hold something out, or options for rows where there are none.
        OSError: what cannot be read.
    """
    if not text_field:
        raise ValueError("field='': expected the name of the field that holds the text of a row")
    source = _find(path, BadRows(text_field, skip_bad_rows), say)
    if not source.bad_rows.name:
        what = "holds tokens already" if source.is_tokens else "holds no rows"
        check_no_row_options(source.place, what, text_field, skip_bad_rows)
    return source


def check_no_row_options(data: str | Path, what: str, text_field: str, skip_bad_rows: bool) -> None:
    """Raise ValueError for options that say how rows are read, with data of which no rows are read.

    Args:
        data: the file or folder; ``what``: what it is, for the message.
        text_field, skip_bad_rows: as of :func:`find_source`.
    """
    for name, value, default in (("field", text_field, "text"), ("skip_bad_rows", skip_bad_rows, False)):
        if value != default:
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"{name}={value!r} with data={str(data)!r}, which {what}: expected no {option}, it is for rows of text"
            )


def _find(path: Path | None, bad: BadRows, say: Callable[[str], None]) -> Source:
    if path is None:
        root = standard_library()
        say(f"Reading the Python standard library's source in {root}")
        return _of_files(root, list_files(root, suffix=".py", skipped=STDLIB_SKIPPED, say=say))
    root = path
    if root.is_file():
        if is_archive(root.name):
            raise ValueError(
                f"data={str(path)!r} is an archive: expected it unpacked, or one of text alone ({', '.join(COMPRESSED)})"
            )
        if is_shard(root.name):
            say(f"Reading the shard of tokens {root}")
            return _of_shards(root, [root.name])
        kind = kind_of(root)
        if (reason := unreadable_reason(root, kind)) is not None:
            raise ValueError(f"data={str(path)!r} {reason}")
        say(f"Reading the file {root}")
        return _of_one_file(root) if kind is None else _of_rows(root, {root.name: kind}, bad)
    if not root.is_dir():
        what = "a pipe or a device" if root.exists() else "not there"
        raise ValueError(f"data={str(path)!r} is {what}: expected a file or a folder of text")
    say(f"Reading the folder {root}")
    names = list_files(root, say=say)
    if "prepared.json" in names:
        raise ValueError(f"data={str(path)!r} is prepared already: expected text")
    if _SPLITS in names or set(_SAVED) <= set(names):
        return _of_data_set(root, names, bad, say)
    if shards := list(filter(is_shard, names)):
        others = [name for name in names if not is_shard(name)]
        if others and not _held_out_shards(shards):
            raise ValueError(
                f"data={str(path)!r} holds shards of tokens, such as {shards[0]}, and other files, such as {others[0]}: "
                "expected a folder of one kind, or shards to train on and some with 'val' in the name"
            )
        if others:
            say(f"Not read: {list_names(others)} in {root}, as its shards of tokens are read")
        return _of_shards(root, shards)
    kinds = _text_kinds(root, names, say)
    return _of_rows(root, kinds, bad) if any(kinds.values()) else _of_files(root, list(kinds))


def list_names(names: list[str]) -> str:
    """The first five names, and how many there are beside."""
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _text_kinds(root: Path, names: list[str], say: Callable[[str], None]) -> dict[str, str | None]:
    """The kinds of the files that are text or rows; the others are named.

    Raises:
        ValueError: there are others alone.
    """
    places = {name: PurePosixPath(name).parent for name in names}
    there = set(names)
    tokens = {
        place
        for place in {*places.values()}
        if f"{place}/train.tokens" in there
        and not there.isdisjoint({f"{place}/prepared.json", f"{place}/unfinished.json"})
    }
    kinds = {name: None if is_archive(name) or places[name] in tokens else kind_of(root / name) for name in names}
    saved = {places[name] for name, kind in kinds.items() if kind == "arrow"}
    metadata = {str(place / one) for place in saved for one in _SAVED} | {str(one.parent / _SPLITS) for one in saved}
    left_out: dict[PurePosixPath, list[str]] = {}
    for name in names:
        if places[name] in tokens or kinds[name] == "arrow" or name in metadata:
            left_out.setdefault(places[name], []).append(PurePosixPath(name).name)
        elif is_archive(name):
            say(f"Not read: {root / name} is an archive")
        elif (reason := unreadable_reason(root / name, kinds[name])) is not None:
            say(f"Not read: {root / name} {reason}")
        else:
            continue
        del kinds[name]
    for place, lasts in left_out.items():
        what = "longnet prepare" if place in tokens else "datasets"
        say(f"Not read: {list_names(lasts)} in {root / place}, written by {what}: expected that folder alone as data")
    if left_out and not kinds:
        raise ValueError(
            f"data={str(root)!r} holds no text, but what other programs have saved in "
            f"{list_names([str(root / place) for place in left_out])}: expected text, or the folder of one saved data set"
        )
    return kinds


def whole_character(text: bytes, place: int) -> int:
    """The place, or that of the UTF-8 character which it would cut."""
    for first in range(place - 1, max(place - 4, -1), -1):
        if text[first] >= 0xC0:
            length = 2 + (text[first] >= 0xE0) + (text[first] >= 0xF0)
            return first if first + length > place else place
        if text[first] < 0x80:
            break
    return place


def _source(
    root: Path, names: list[str], split: str, pieces: Callable[[], Iterator[Piece]], is_sized: bool = True
) -> Source:
    folder = root.parent if root.is_file() else root
    states = [(name, (folder / name).stat()) for name in names]
    state = tuple((name, one.st_size, one.st_mtime_ns) for name, one in states)
    is_sized = is_sized and not any(is_compressed(folder / name) for name in names)
    return Source(root, state, sum(size for _, size, _ in state) if is_sized else 0, split, pieces)


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


def _of_rows(root: Path, kinds: dict[str, str | None], bad: BadRows) -> Source:
    """Every row of the files of a kind is a document, and every other file one."""
    folder = root.parent if root.is_file() else root
    readers = {"json": json_rows, "parquet": parquet_rows}

    def pieces() -> Iterator[Piece]:
        bad.clear()
        for name, kind in kinds.items():
            path = folder / name
            if kind is None:
                yield from _file_pieces(path, is_held_out(name), path.stat().st_size)
                continue
            for number, text in readers[kind](path, bad):
                yield Piece(text, is_held_out(f"{name}:{number}"), name=str(path))

    split = "by row: a hash of file and row, 1 row in 10 held out"
    return replace(_source(root, list(kinds), split, pieces, "parquet" not in kinds.values()), bad_rows=bad)


def _of_data_set(root: Path, names: list[str], bad: BadRows, say: Callable[[str], None]) -> Source:
    """What ``datasets.save_to_disk`` has written: one data set, or several splits."""
    import datasets  # type: ignore[import-untyped]

    others = [one for one in names if not one.endswith((*_SAVED, _SPLITS, ".arrow"))]
    if others:
        say(f"Not read: {list_names(others)} in {root}, as its saved data set is read")
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


@dataclass(frozen=True)
class _Shard:
    """Tokens of a shard.

    Attributes:
        path: the file.
        dtype: of a token.
        start: the byte of the first token.
        count: how many tokens there are.
        held_out: whether they are.
    """

    path: Path
    dtype: np.dtype[np.unsignedinteger]
    start: int
    count: int
    held_out: bool

    def pieces(self) -> Iterator[Piece]:
        most = max(1, _PIECE // self.dtype.itemsize)
        with open(self.path, "rb") as file:
            file.seek(self.start)
            for first in range(0, self.count, most):
                size = min(most, self.count - first) * self.dtype.itemsize
                if len(content := file.read(size)) < size:
                    raise ValueError(f"{self.path} has become shorter while it was read: {size:,} bytes are missing")
                yield Piece(np.frombuffer(content, self.dtype), self.held_out, first == 0, False, str(self.path))


def _held_out_shards(names: list[str]) -> set[str]:
    """Those with ``val`` in the name; none unless there are others too."""
    held_out = {name for name in names if "val" in Path(name).name}
    return held_out if len(held_out) < len(names) else set()


def _read_shard(path: Path, held_out: bool) -> _Shard:
    """The header of a shard, if it has one.

    Raises:
        ValueError: the file is shorter than the header says, or ends within a token.
    """
    with open(path, "rb") as file:
        header, size = file.read(12), file.seek(0, os.SEEK_END)
    kind = _SHARD_TYPES.get(int.from_bytes(header[:4], "little"))
    dtype, start = np.dtype(kind or "<u2"), 0 if kind is None else _SHARD_HEADER
    count, half = divmod(max(0, size - start), dtype.itemsize)
    # The third number of the header is how many tokens follow.
    if kind is not None and (size < start or count < (declared := int.from_bytes(header[8:], "little"))):
        says = "is shorter than its header" if size < start else f"holds {count:,} tokens, its header says {declared:,}"
        raise ValueError(f"{path} {says}: expected a whole shard")
    if half:
        raise ValueError(f"{path} is no shard of {dtype.name}: it holds half a token")
    return _Shard(path, dtype, start, count, held_out)


def _of_shards(root: Path, names: list[str]) -> Source:
    folder, held_out = root.parent if root.is_file() else root, _held_out_shards(names)
    shards = [_read_shard(folder / name, name in held_out) for name in names]
    split = "by shard: those with 'val' in the name are held out"
    if len(shards) == 1:
        (one,) = shards
        count = int(one.count * HELD_OUT_SHARE)
        if count < 2:
            raise ValueError(f"{one.path} holds {one.count} tokens: expected at least 20, the last tenth is held out")
        first = replace(one, count=one.count - count)
        start = one.start + first.count * one.dtype.itemsize
        shards, split = (
            [first, _Shard(one.path, one.dtype, start, count, True)],
            "one shard: its last tenth is held out",
        )
    elif not held_out:
        raise ValueError(
            f"data={str(root)!r} holds {names[:3]}: expected shards to train on and some with 'val' in the name"
        )

    def pieces() -> Iterator[Piece]:
        for shard in shards:
            yield from shard.pieces()

    return replace(_source(root, names, split, pieces), is_tokens=True)
