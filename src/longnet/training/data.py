"""Bytes to train on: read a file or a folder, hold some of it out, draw windows.

The vocabulary is the 256 byte values and a file enters as it is on disk, with no header and no separator between files:
every byte a model is scored on is a byte of the data, and compressors can be compared on exactly the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HELD_OUT_SHARE = 1 / 10
_CHUNK = 1 << 24
_STDLIB_SKIPPED = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
)


@dataclass(frozen=True)
class Corpus:
    """Training and held-out bytes.

    Attributes:
        source: the file or folder they were read from.
        train: (bytes,) uint8, the training files one after the other in sorted order.
        held_out: (bytes,) uint8, the same for the files held out.
        train_files, held_out_files: how many files each part came from.
        split: how the parts were chosen, in words.
        fingerprint: SHA-256 (hex) over every relative path, size and content.
    """

    source: str
    train: np.ndarray
    held_out: np.ndarray
    train_files: int
    held_out_files: int
    split: str
    fingerprint: str

    def describe(self) -> dict[str, object]:
        """What a run records about its data."""
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

    Of the standard library its tests are left out, and what is generated: ``encodings`` (tables that nearly repeat each
    other, so that held-out files would have twins in training) and ``pydoc_data`` (one file of documentation).

    A folder is read whole: every regular file below it in sorted order, hidden names (a leading dot) left out. A file is
    held out when the hash of its relative path falls in the lowest tenth, so the split depends on no seed and a file stays on
    its side when others come or go. One file alone is memory-mapped and its last tenth is held out.

    Args:
        path: what to read.
        say: called with a line of text before each slow part.

    Raises:
        ValueError: nothing is there, or too little of it to split.
        OSError: a file that cannot be read.
    """
    tell = say or (lambda text: None)
    if path is None:
        root = standard_library()
        tell(f"Reading the Python standard library's source in {root}")
        return _read_files(root, list_files(root, suffix=".py", skipped=_STDLIB_SKIPPED))
    root = Path(path)
    if root.is_file():
        tell(f"Reading the file {root}")
        return _map_file(root)
    if root.is_dir():
        tell(f"Reading the folder {root}")
        return _read_files(root, list_files(root))
    raise ValueError(f"data={str(path)!r} is not there: expected a file or a folder of text")


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
    return _place(relative_path) < HELD_OUT_SHARE


def draw_windows(stream: np.ndarray, context: int, count: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """The windows of one training step, uniform over the stream; they depend on the arguments alone.

    A counter-based generator keyed by ``(seed, step)`` gives the starts: any step can be drawn again without the ones before.

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
    room = int(stream.size) - context
    if room < 1:
        raise ValueError(f"context={context} needs {context + 1} bytes in a row: the training data holds {stream.size}")
    generator = np.random.Philox(key=np.array([seed, step], dtype=np.uint64))
    # Raw words, not Generator.integers: their sequence is fixed by the algorithm and outlives numpy's versions.
    starts = generator.random_raw(count) % np.uint64(room)
    return cut_windows(stream, context, starts.astype(np.int64))


def cut_windows(stream: np.ndarray, context: int, starts: np.ndarray) -> tuple[Tensor, Tensor]:
    """The windows that begin at ``starts`` (B,): ``(tokens, targets)``, each (B, context) int64."""
    rows = np.stack([stream[start : start + context + 1] for start in starts.tolist()]).astype(np.int64)
    both = torch.from_numpy(rows)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def _place(relative_path: str) -> float:
    """A file's fixed place in [0, 1)."""
    digest = hashlib.sha256(relative_path.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def list_files(root: Path, suffix: str = "", skipped: frozenset[str] = frozenset()) -> list[str]:
    """Relative paths of the non-empty regular files below ``root``, sorted; hidden names and ``skipped`` folders left out.

    Raises:
        OSError: a folder that cannot be read.
    """
    found: list[str] = []

    def refuse(error: OSError) -> None:
        raise error

    for folder, names, files in os.walk(root, onerror=refuse):
        names[:] = [name for name in names if not name.startswith(".") and name not in skipped]
        for name in files:
            whole = Path(folder, name)
            if not name.startswith(".") and name.endswith(suffix) and whole.is_file() and whole.stat().st_size:
                found.append(whole.relative_to(root).as_posix())
    return sorted(found)


def _read_files(root: Path, names: list[str]) -> Corpus:
    if len(names) < 2:
        raise ValueError(
            f"data={str(root)!r} holds {len(names)} non-empty file(s): expected at least two, "
            "one to train on and one to hold out (or give the path of a single file)"
        )
    held = {name for name in names if is_held_out(name)}
    split = "by file: a hash of the relative path, 1 file in 10 held out"
    if not held or len(held) == len(names):
        held = {min(names, key=_place)}
        split = "by file: the one file whose relative path has the lowest hash is held out"
    digest = hashlib.sha256()
    parts = (bytearray(), bytearray())
    for name in names:
        content = (root / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode("utf-8", "surrogateescape"))
        digest.update(content)
        parts[name in held].extend(content)
    train, held_out = (np.frombuffer(part, dtype=np.uint8) for part in parts)
    return Corpus(str(root), train, held_out, len(names) - len(held), len(held), split, digest.hexdigest())


def _map_file(path: Path) -> Corpus:
    size = path.stat().st_size
    cut = size - int(size * HELD_OUT_SHARE)
    if size - cut < 2:
        raise ValueError(f"data={str(path)!r} holds {size} bytes: expected at least 20, the last tenth is held out")
    content = np.memmap(path, dtype=np.uint8, mode="r")
    digest = hashlib.sha256(f"{path.name}\0{size}\0".encode("utf-8", "surrogateescape"))
    for start in range(0, size, _CHUNK):
        digest.update(content[start : start + _CHUNK].tobytes())
    return Corpus(
        str(path), content[:cut], content[cut:], 1, 1, "one file: its last tenth is held out", digest.hexdigest()
    )
