"""Gather the text files of this machine into a corpus: some to train on, others to read.

    python scripts/corpus.py /usr /opt --out corpus --bytes 1000000000

Writes ``corpus/train`` (a tenth of all files) and ``corpus/read`` (others, in a random order, until there are as many bytes as
asked for). A file counts as text when its first 64 KiB hold no zero byte; other files fill up what text lacks, at the end. A
content that was seen before is left out, so nothing that is trained on is read later as the copy of a file.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_HEAD, _LARGEST, _PART = 1 << 16, 1 << 24, 1 << 22


class Parts:
    """Bytes written one after the other, as files of about 4 MiB each."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder, self.bytes, self.files = folder, 0, 0
        self._number, self._room = 0, 0

    def add(self, content: bytes) -> None:
        if self._room <= 0:
            self._number, self._room = self._number + 1, _PART
        with (self._folder / f"{self._number:05d}.txt").open("ab") as part:
            part.write(content)
        self._room -= len(content)
        self.bytes, self.files = self.bytes + len(content), self.files + 1


def find(roots: list[Path]) -> Iterator[Path]:
    """Regular files below ``roots``, links aside."""
    for root in roots:
        for folder, _, names in os.walk(root):
            for name in names:
                path = Path(folder, name)
                if not path.is_symlink() and path.is_file() and 0 < path.stat().st_size <= _LARGEST:
                    yield path


def gather(roots: list[Path], out: Path, wanted: int) -> None:
    """Write both parts and say what they hold."""
    key = lambda path: hashlib.blake2b(os.fsencode(path), digest_size=8).digest()  # noqa: E731
    train, read = Parts(out / "train"), Parts(out / "read")
    seen: set[bytes] = set()
    others: list[Path] = []
    kinds: Counter[str] = Counter()
    for path in sorted(find(roots), key=key):
        if read.bytes >= wanted:
            break
        try:
            content = path.read_bytes()
        except OSError:
            continue
        digest = hashlib.blake2b(content, digest_size=16).digest()
        if b"\0" in content[:_HEAD]:
            others.append(path)
            continue
        if digest in seen:
            continue
        seen.add(digest)
        (train if digest[0] < 26 else read).add(content)
        kinds[path.suffix.lower() or "none"] += len(content)
    text = read.bytes
    while read.bytes < wanted and others:
        read.add(others.pop(0).read_bytes())
    for name, parts in (("train", train), ("read", read)):
        print(f"{name}: {parts.bytes:,} bytes of {parts.files:,} files")
    print("by suffix: " + ", ".join(f"{kind} {size / 1e6:,.0f} MB" for kind, size in kinds.most_common(12)))
    print(f"the first {text:,} bytes to read are text")
    if read.bytes < wanted:
        sys.exit(f"there are {read.bytes:,} bytes to read, fewer than the {wanted:,} asked for: name more folders")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("roots", nargs="+", type=Path, help="folders to look through")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--bytes", type=int, required=True, help="of the part to read")
    options = parser.parse_args()
    gather(options.roots, options.out, options.bytes)


if __name__ == "__main__":
    main()
