"""Text of this machine, split by file: what is trained on, and other text that is not nearly the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SUFFIXES = (".py", ".pyi", ".txt", ".md", ".rst")
_LARGEST = 1 << 20
# A held-out file is left out where more than this share of its passages is trained on.
_SHARED = 0.2
_LINES = 4


@dataclass(frozen=True)
class Text:
    """Bytes to train on and held-out bytes, files joined in the order of their paths.

    Attributes:
        facts: how many files and bytes each part has, and how many held-out files were left out as near copies.
    """

    train: np.ndarray
    held_out: np.ndarray
    facts: dict[str, int]


def read_text(roots: Iterable[Path], most_bytes: int = 1 << 28) -> Text:
    """Read the text files below the roots; one file in sixteen, by a hash of its content, is held out.

    Raises:
        ValueError: no text.
    """
    train: list[bytes] = []
    held: list[bytes] = []
    seen: set[bytes] = set()
    total = 0
    for content in _contents(roots):
        digest = hashlib.blake2b(content, digest_size=16).digest()
        if digest in seen or total >= most_bytes:
            continue
        seen.add(digest)
        total += len(content)
        (held if digest[0] < 16 else train).append(content)
    passages = {passage for content in train for passage in _passages(content)}
    fresh = [content for content in held if _share_of(content, passages) <= _SHARED]
    if not train or not fresh:
        raise ValueError(f"{len(train)} files to train on and {len(fresh)} held out: expected text below {list(roots)}")
    facts = {
        "train_files": len(train),
        "train_bytes": sum(map(len, train)),
        "held_out_files": len(fresh),
        "held_out_bytes": sum(map(len, fresh)),
        "near_copies_left_out": len(held) - len(fresh),
    }
    return Text(_join(train), _join(fresh), facts)


def _contents(roots: Iterable[Path]) -> Iterator[bytes]:
    for root in roots:
        for path in sorted(root.rglob("*")):
            if path.suffix in SUFFIXES and path.is_file() and not path.is_symlink() and path.stat().st_size <= _LARGEST:
                content = path.read_bytes()
                if len(content) >= 256 and b"\0" not in content:
                    yield content


def _passages(content: bytes) -> set[int]:
    """Hashes of every few lines in a row, blank ones aside."""
    lines = [line.strip() for line in content.splitlines() if line.strip()]
    return {hash(tuple(lines[at : at + _LINES])) for at in range(max(1, len(lines) - _LINES + 1))}


def _share_of(content: bytes, passages: set[int]) -> float:
    own = _passages(content)
    return len(own & passages) / len(own)


def _join(contents: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(contents), dtype=np.uint8)


def windows(text: np.ndarray, count: int, length: int, seed: int) -> np.ndarray:
    """(count, length) bytes at random places: the same for every pattern.

    Raises:
        ValueError: a text shorter than one window.
    """
    if len(text) < length:
        raise ValueError(f"the text has {len(text)} bytes: expected at least one window of {length}")
    starts = np.random.Generator(np.random.Philox(key=seed)).integers(0, len(text) - length + 1, count)
    return text[starts[:, None] + np.arange(length)]
