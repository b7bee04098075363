"""Which files are data: everything below a folder, links followed, each file once."""

from __future__ import annotations

import hashlib
import os
import stat
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

HELD_OUT_SHARE = 1 / 10
STDLIB_SKIPPED = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
)
"""Tests, and generated files: ``encodings`` are tables that nearly repeat each other, so that held-out files would have near
copies in training, and ``pydoc_data`` is one file of documentation."""


def standard_library() -> Path:
    """The folder of the running Python's standard library.

    Raises:
        ValueError: it is not kept as source files (an embedded or zipped Python).
    """
    for folder in (Path(sysconfig.get_path("stdlib")), Path(os.__file__).parent):
        if (folder / "os.py").is_file():
            return folder
    raise ValueError("data=None: this Python keeps no standard library source files, expected a path to text (--data)")


def is_held_out(name: str) -> bool:
    """Whether the document of this name (a relative path with ``/`` between its parts, or a row's) is held out."""
    return hash_share(name) < HELD_OUT_SHARE


def hash_share(name: str) -> float:
    """A number in [0, 1) that a document's name fixes."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


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
                f"out={out!r} lies in data={data!r} (as {str(folder)!r}), so its files would be read as data: "
                "expected a folder outside of it"
            )


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
