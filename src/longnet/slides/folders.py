"""The files of a folder and of its folders, in words and as paths."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

HIDDEN = "hidden, as its name begins with a dot"


def files_below(folder: Path, refuse: Callable[[OSError], None]) -> list[Path]:
    """Relative paths of all files in a folder and its folders, sorted; ``refuse`` gets the error of each unreadable folder."""
    walk = os.walk(folder, onerror=refuse)
    return sorted(Path(at, name).relative_to(folder) for at, _, names in walk for name in names)


def is_hidden(path: Path) -> bool:
    """Whether a file, or a folder of its relative path, has a name that begins with a dot."""
    return any(part.startswith(".") for part in path.parts)


def counted(number: int, thing: str) -> str:
    """A number of things in words: 1 slide, 2 slides."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def listed(names: Sequence[str], most: int = 8) -> str:
    """The first few names in words."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
