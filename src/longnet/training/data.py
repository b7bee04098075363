"""Training data: read the bytes of a file or a folder, hold some of them out, draw windows.

The vocabulary is the 256 byte values. Files are read unchanged, with no header and no separator between them: every byte that
a model is scored on is a byte of the data, and compressors can be compared on exactly the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sysconfig
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longnet.training.files import read_into

HELD_OUT_SHARE = 1 / 10
_CHUNK = 1 << 24
_STDLIB_SKIPPED = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
)


class BytesOnDisk:
    """A part of a file as (bytes,) uint8 that is read piece by piece: a slice of it is an array.

    The file is not mapped: a mapped file that becomes shorter ends the process.

    Args:
        path: the file. It stays open.
        start, stop: the first byte of the part, and the first byte after it.

    Attributes:
        size: bytes of the part.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, start: int, stop: int) -> None:
        self._path, self._start, self.size = path, start, stop - start
        self._file = FileIO(path)
        weakref.finalize(self, self._file.close)

    def __getitem__(self, place: slice) -> np.ndarray:
        """The bytes of a slice without a step.

        Raises:
            ValueError: the file has become shorter.
        """
        start, stop, step = place.indices(self.size)
        if step != 1:
            raise ValueError(f"step={step} in a slice of {self._path}: expected none")
        content = np.empty(max(0, stop - start), dtype=np.uint8)
        self._file.seek(self._start + start)
        if (done := read_into(self._file, content.data)) < content.size:
            raise ValueError(
                f"{self._path} has become shorter while it was read: "
                f"the bytes from {self._start + start + done:,} to {self._start + stop:,} are missing. Restore the file; "
                "a run that has begun continues from its last checkpoint with --resume"
            )
        return content

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or np.uint8, copy=False)

    def tobytes(self) -> bytes:
        """All bytes of the part."""
        return self[:].tobytes()


@dataclass(frozen=True)
class Corpus:
    """Training and held-out bytes.

    Attributes:
        source: the file or folder they were read from.
        train: (bytes,) uint8, the training files one after the other in sorted order; read piece by piece for one file alone.
        held_out: (bytes,) uint8, the same for the files held out.
        train_files, held_out_files: how many files each part came from.
        split: how the parts were chosen, in words.
        fingerprint: SHA-256 (hex) over every relative path, size and content.
    """

    source: str
    train: np.ndarray | BytesOnDisk
    held_out: np.ndarray | BytesOnDisk
    train_files: int
    held_out_files: int
    split: str
    fingerprint: str

    @property
    def in_memory(self) -> bool:
        """Whether all bytes are in memory: a later change of the files does not change them."""
        return isinstance(self.train, np.ndarray) and isinstance(self.held_out, np.ndarray)

    def describe(self) -> dict[str, object]:
        """The facts about the data that a run records."""
        return {
            "source": self.source,
            "train_bytes": int(self.train.size),
            "held_out_bytes": int(self.held_out.size),
            "train_files": self.train_files,
            "held_out_files": self.held_out_files,
            "split": self.split,
            "fingerprint": self.fingerprint,
        }


def read_corpus(path: str | os.PathLike[str] | None = None, say: Callable[[str], None] | None = None) -> Corpus:
    """Read a file, a folder, or (``None``) the ``.py`` files of Python's own standard library.

    The standard library is read without its tests and generated files. These are ``encodings`` (tables that nearly repeat each
    other, so that held-out files would have near copies in training) and ``pydoc_data`` (one file of documentation).

    A folder is read whole: every regular file below it in sorted order, hidden names (a leading dot) left out, links to files
    and folders followed (see ``list_files``). A file is held out when the hash of its relative path falls in the lowest tenth,
    so the split depends on no seed, and a file stays in its part when others come or go. A single file is read piece by piece,
    as its bytes are needed, and its last tenth is held out.

    Args:
        path: what to read.
        say: called with a line of text before each slow step, for everything that is not read, and with the bytes so far
            when reading takes longer than two seconds.

    Raises:
        ValueError: no data, too little to split, or a folder that is larger than the memory.
        OSError: a file that cannot be read.
    """
    tell = say or (lambda text: None)
    if path is None:
        root = standard_library()
        tell(f"Reading the Python standard library's source in {root}")
        return _read_files(root, list_files(root, suffix=".py", skipped=_STDLIB_SKIPPED, say=tell), tell)
    root = Path(path)
    if root.is_file():
        tell(f"Reading the file {root}")
        return _map_file(root, tell)
    if root.is_dir():
        tell(f"Reading the folder {root}")
        return _read_files(root, list_files(root, say=tell), tell)
    what = "a pipe or a device" if root.exists() else "not there"
    raise ValueError(f"data={str(path)!r} is {what}: expected a file or a folder of text")


def standard_library() -> Path:
    """The folder of the running Python's standard library.

    Raises:
        ValueError: it is not kept as source files (an embedded or zipped Python).
    """
    for folder in (Path(sysconfig.get_path("stdlib")), Path(os.__file__).parent):
        if (folder / "os.py").is_file():
            return folder
    raise ValueError("data=None: this Python keeps no standard library source files, expected a path to text (--data)")


def is_held_out(relative_path: str) -> bool:
    """Whether the file of a folder at this path (``/`` between its parts) is held out."""
    return _hash_share(relative_path) < HELD_OUT_SHARE


def check_lengths(corpus: Corpus, context: int) -> None:
    """Raise ValueError unless the training data fill a window of ``context`` bytes and 2 bytes are held out."""
    _count_starts(corpus.train, context)
    if corpus.held_out.size < 2:
        raise ValueError(
            f"data={corpus.source!r} has {corpus.held_out.size} held-out byte(s) in {corpus.held_out_files} file(s): "
            "expected at least 2, as the first is not predicted"
        )


def check_outside(data: str | None, out: str) -> None:
    """Raise ValueError if a run would change its own data: a folder that is read is the run folder or lies in it.

    Args:
        data: what is read.
        out: the run folder, which is there already.
    """
    if data is None or not Path(data).is_dir():
        return
    place = Path(out).resolve()
    for folder, _, _ in _walk(Path(data), frozenset(), lambda text: None):
        if folder.resolve().is_relative_to(place):
            raise ValueError(
                f"out={out!r} lies in data={data!r} (as {str(folder)!r}), so the run's files would be read as data: "
                "expected a folder outside of it"
            )


def draw_windows(
    stream: np.ndarray | BytesOnDisk, context: int, count: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """The windows of one training step, uniform over the stream; they depend on the arguments alone.

    A counter-based generator keyed by ``(seed, step)`` gives the starts: any step can be drawn again without the previous ones.

    Args:
        stream: (bytes,) uint8.
        context: bytes per window, N.
        count: windows, B.
        seed, step: non-negative, below 2 ** 63.

    Returns:
        ``(tokens, targets)``, each (B, N) int64, the targets one byte further on.

    Raises:
        ValueError: the stream is shorter than one window and its last target.
    """
    count_of_starts = _count_starts(stream, context)
    generator = np.random.Philox(key=np.array([seed, step], dtype=np.uint64))
    # Raw words, not Generator.integers: the algorithm fixes their sequence, in every version of numpy.
    starts = generator.random_raw(count) % np.uint64(count_of_starts)
    return cut_windows(stream, context, starts.astype(np.int64))


def _count_starts(stream: np.ndarray | BytesOnDisk, context: int) -> int:
    """The number of window starts; raise ValueError for none."""
    starts = int(stream.size) - context
    if starts < 1:
        raise ValueError(f"context={context} needs {context + 1} bytes in a row: the training data holds {stream.size}")
    return starts


def cut_windows(stream: np.ndarray | BytesOnDisk, context: int, starts: np.ndarray) -> tuple[Tensor, Tensor]:
    """The windows that begin at ``starts`` (B,): ``(tokens, targets)``, each (B, context) int64."""
    rows = np.stack([stream[start : start + context + 1] for start in starts.tolist()]).astype(np.int64)
    both = torch.from_numpy(rows)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def _hash_share(relative_path: str) -> float:
    """A number in [0, 1) that a file's path fixes."""
    digest = hashlib.sha256(relative_path.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def list_files(
    root: Path,
    suffix: str = "",
    skipped: frozenset[str] = frozenset(),
    say: Callable[[str], None] | None = None,
) -> list[str]:
    """Relative paths of the non-empty regular files below ``root``, sorted; hidden names and ``skipped`` folders left out.

    Links are followed, and no folder or file is read twice: a loop ends, and no byte is both trained on and held out. Of
    several names of one file (links and hard links) the first in sorted order counts, and before it one without a link.

    Args:
        say: called with a line of text for everything else that is not read: pipes, devices, sockets, broken links, files
            without permission to read them, links to folders that are read already, further names of files.

    Raises:
        OSError: a folder that cannot be read.
    """
    tell = say or (lambda text: None)
    names: list[tuple[bool, str, tuple[int, int]]] = []
    for folder, entries, linked in _walk(root, skipped, tell):
        for entry in entries:
            path = folder / entry.name
            if entry.name.endswith(suffix) and (state := _readable_state(path, tell)) is not None:
                identity = (state.st_dev, state.st_ino)
                names.append((linked or entry.is_symlink(), path.relative_to(root).as_posix(), identity))
    files: dict[tuple[int, int], str] = {}
    again = []
    for _, name, identity in sorted(names):
        if files.setdefault(identity, name) != name:
            again.append(name)
    if again:
        count = "1 name of a file that is" if len(again) == 1 else f"{len(again):,} names of files that are"
        tell(f"Not read: {count} read already under another name, such as {root / again[0]}")
    return sorted(files.values())


def _walk(
    root: Path, skipped: frozenset[str], tell: Callable[[str], None]
) -> Iterator[tuple[Path, list[os.DirEntry[str]], bool]]:
    """Every folder at and below ``root`` once: its path, its entries but folders, and whether a link leads to it.

    Links to folders come last, so that folders keep the paths that they have without links. Hidden names and ``skipped``
    folders are left out.
    """
    seen: set[tuple[int, int]] = set()
    folders: list[Path] = [root]
    links: list[Path] = []
    linked = False
    while folders or links:
        linked = linked or not folders
        folder = folders.pop() if folders else links.pop(0)
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in seen:
            tell(f"Not read: {folder} is a link to a folder that is read already")
            continue
        seen.add((state.st_dev, state.st_ino))
        with os.scandir(folder) as listing:
            entries = sorted((entry for entry in listing if not entry.name.startswith(".")), key=lambda one: one.name)
        others = []
        for entry in entries:
            path = folder / entry.name
            if not path.is_dir():
                others.append(entry)
            elif entry.name not in skipped:
                (links if entry.is_symlink() else folders).append(path)
        yield folder, others, linked


def _readable_state(path: Path, tell: Callable[[str], None]) -> os.stat_result | None:
    """The state of a file with content; report everything else but an empty file."""
    try:
        state = os.stat(path)
    except OSError as error:
        tell(f"Not read: {path} is a broken link ({error.strerror})")
        return None
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    if not stat.S_ISREG(state.st_mode):
        tell(f"Not read: {path} is {kinds.get(stat.S_IFMT(state.st_mode), 'not a regular file')}")
        return None
    if not os.access(path, os.R_OK):
        tell(f"Not read: there is no permission to read {path}")
        return None
    return state if state.st_size > 0 else None


def _read_files(root: Path, names: list[str], say: Callable[[str], None]) -> Corpus:
    if len(names) < 2:
        raise ValueError(
            f"data={str(root)!r} holds {len(names)} non-empty file(s): expected at least two, "
            "one to train on and one to hold out (or give the path of a single file)"
        )
    held_out_names = {name for name in names if is_held_out(name)}
    split = "by file: a hash of the relative path, 1 file in 10 held out"
    if not held_out_names or len(held_out_names) == len(names):
        held_out_names = {min(names, key=_hash_share)}
        split = "by file: the one file whose relative path has the lowest hash is held out"
    size = sum((root / name).stat().st_size for name in names)
    too_large = (
        f"data={str(root)!r} holds {size:,} bytes, more than fits into memory: expected less, or one file alone, which is "
        "read piece by piece"
    )
    if size > (_memory() or size):
        raise ValueError(too_large)
    digest = hashlib.sha256()
    parts = (bytearray(), bytearray())
    progress = _ReadProgress(size, say)
    try:
        for name in names:
            path = root / name
            file = BytesOnDisk(path, 0, path.stat().st_size)
            digest.update(f"{name}\0{file.size}\0".encode("utf-8", "surrogateescape"))
            for chunk in progress.chunks(file):
                digest.update(chunk)
                parts[name in held_out_names].extend(chunk)
    except MemoryError:
        raise ValueError(too_large) from None
    train, held_out = (np.frombuffer(part, dtype=np.uint8) for part in parts)
    count = len(held_out_names)
    return Corpus(str(root), train, held_out, len(names) - count, count, split, digest.hexdigest())


def _map_file(path: Path, say: Callable[[str], None]) -> Corpus:
    size = path.stat().st_size
    cut = size - int(size * HELD_OUT_SHARE)
    if size - cut < 2:
        raise ValueError(f"data={str(path)!r} holds {size} bytes: expected at least 20, the last tenth is held out")
    train, held_out = BytesOnDisk(path, 0, cut), BytesOnDisk(path, cut, size)
    digest = hashlib.sha256(f"{path.name}\0{size}\0".encode("utf-8", "surrogateescape"))
    progress = _ReadProgress(size, say)
    for part in (train, held_out):
        for chunk in progress.chunks(part):
            digest.update(chunk)
    return Corpus(str(path), train, held_out, 1, 1, "one file: its last tenth is held out", digest.hexdigest())


class _ReadProgress:
    """Reads data chunk by chunk and says how far it is: after two seconds, then ever more rarely, once a minute at last."""

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self._total, self._say = total, say
        self._done, self._wait = 0, 2.0
        self._due = time.monotonic() + self._wait

    def chunks(self, file: BytesOnDisk) -> Iterator[memoryview]:
        for start in range(0, file.size, _CHUNK):
            chunk = file[start : start + _CHUNK].data
            yield chunk
            self._done += len(chunk)
            if time.monotonic() >= self._due:
                self._say(f"Read {self._done:,} of {self._total:,} bytes")
                self._wait = min(2 * self._wait, 60.0)
                self._due = time.monotonic() + self._wait


def _memory() -> int | None:
    """The machine's memory in bytes; None where the system does not report it."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf.
        return None
