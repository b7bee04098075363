"""Files by their kind: compressed ones, shards of tokens, and those of which every row is a document."""

from __future__ import annotations

import importlib
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}
"""What the standard library decompresses, and the module that does."""
_ARCHIVES = (
    ".zip",
    ".zst",
    ".7z",
    ".rar",
    ".lz4",
    ".tgz",
    ".tbz2",
    ".txz",
    *(f".tar{end}" for end in ("", *COMPRESSED)),
)
_KINDS = {".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".arrow": "arrow"}
_MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow"}
"""First bytes of files that are no text, whatever they are called. Arrow's stream files, which ``datasets`` saves, have none."""


class BadRow(ValueError):
    """A row without a text, which ``--skip-bad-rows`` leaves out."""


class BadRows:
    """Rows without a text: refused, or counted and left out.

    Args:
        name: of the field that holds the text.
        skip: whether to leave them out.
    """

    def __init__(self, name: str, skip: bool) -> None:
        self.name, self.skip = name, skip
        self.clear()

    def clear(self) -> None:
        """Forget what was counted."""
        self.count, self._first = 0, list[str]()

    def text_of(self, row: object, where: str) -> bytes | None:
        """The text of a row; None if it has none and is left out."""
        value = row.get(self.name) if isinstance(row, dict) else None
        if isinstance(value, str):
            return value.encode("utf-8", "surrogatepass")
        held = (
            ", ".join(f"{name!r} ({type(one).__name__})" for name, one in row.items()) if isinstance(row, dict) else ""
        )
        self.add(where, f"has {held or f'a {type(row).__name__}'}, expected a text of this name")
        return None

    def add(self, where: str, reason: str, count: int = 1) -> None:
        """Refuse or count rows.

        Raises:
            BadRow: they are not to be left out.
        """
        if not self.skip:
            raise BadRow(f"field={self.name!r}: {where} {reason}. --skip-bad-rows leaves out such rows and counts them")
        self.count += count
        if len(self._first) < 3:
            self._first.append(f"{where} {reason}")

    def describe(self) -> str:
        """How many, and the first of them by name."""
        more = ", the first of them" if self.count > len(self._first) else ""
        return f"Skipped {self.count:,} row(s) without a text in {self.name!r}{more}: {'; '.join(self._first)}"


def is_archive(name: str) -> bool:
    return name.lower().endswith(_ARCHIVES)


def is_shard(name: str) -> bool:
    """Whether a file holds tokens."""
    return name.lower().endswith(".bin")


def kind_of(path: Path) -> str | None:
    """What a file holds, by its first bytes or its name: rows of ``"json"`` or ``"parquet"``, ``"arrow"``; None for text.

    Raises:
        ValueError: it is compressed, and damaged.
    """
    with opened(path) as file:
        start = file.read(max(map(len, _MAGIC)))
    by_content = [kind for magic, kind in _MAGIC.items() if start.startswith(magic)]
    return by_content[0] if by_content else _KINDS.get(_uncompressed(path).suffix.lower())


def unreadable_reason(path: Path, kind: str | None) -> str | None:
    """Why a file of this kind is not read; None for one that is."""
    if is_compressed(path) and (kind == "parquet" or is_shard(_uncompressed(path).name)):
        return f"is compressed {'Parquet' if kind == 'parquet' else 'shard'}: expected it decompressed"
    if kind == "arrow":
        return "is Arrow: expected the folder of the data set that datasets has saved"
    return None


def _uncompressed(path: Path) -> Path:
    return path.with_suffix("") if is_compressed(path) else path


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in COMPRESSED


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file, decompressed while it is read.

    Raises:
        ValueError: it is compressed, and damaged or not whole.
    """
    if not is_compressed(path):
        with open(path, "rb") as file:
            yield file
        return
    module = importlib.import_module(COMPRESSED[path.suffix.lower()])
    damages = (EOFError, zlib.error, *([module.LZMAError] if hasattr(module, "LZMAError") else []))
    try:
        with module.open(path) as file:
            yield file
    except (*damages, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path} cannot be decompressed ({error}): expected a whole {path.suffix} file") from None


def json_rows(path: Path, bad: BadRows) -> Iterator[tuple[int, bytes]]:
    """Number and text of every line that is not blank."""
    with opened(path) as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                bad.add(f"{path}:{number + 1}", f"is not JSON ({error}), expected an object in each line")
                continue
            if (text := bad.text_of(row, f"{path}:{number + 1}")) is not None:
                yield number, text


def parquet_rows(path: Path, bad: BadRows) -> Iterator[tuple[int, bytes]]:
    from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = {one.name: one.type for one in file.schema_arrow}
            if bad.name not in columns:
                held = ", ".join(f"{name!r} ({kind})" for name, kind in columns.items())
                bad.add(f"{path}", f"has {held}, expected a text of this name", file.metadata.num_rows)
                return
            for batch in file.iter_batches(batch_size=1024, columns=[bad.name]):
                for value in batch.column(0).to_pylist():
                    if (text := bad.text_of({bad.name: value}, f"{path}, row {number + 1}")) is not None:
                        yield number, text
                    number += 1
    except (ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise ValueError(f"{path} is damaged after row {number}: {error}") from None
