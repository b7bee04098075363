"""Prepared data: documents turned into tokens once, in a folder that training reads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from longnet.training.data.sources import Piece, Source, find_source
from longnet.training.data.stream import Stream, TokensOnDisk, count_starts
from longnet.training.data.tokenizer import BYTES, TOKENIZER_FILES, Tokenizer, read_tokenizer
from longnet.training.files import read_json, write_json

_CHUNK = 1 << 24
_FORMAT = "longnet-data-1"
_PARTS = ("train", "held_out")
_LOST = ("skipped_rows", "unknown_tokens", "replaced_characters", "uncertain_cuts")
_PREPARATION = 2  # Another number does not go on with what an older version has half prepared.
Say = Callable[[str], None]


@dataclass(frozen=True)
class Corpus:
    """Training and held-out tokens.

    Attributes:
        source: the file or folder they were read from.
        train: (tokens,), the training documents one after the other, in an order that does not change.
        held_out: (tokens,), the same for the documents held out.
        train_documents, held_out_documents: how many documents each part has.
        train_bytes, held_out_bytes: bytes of their text.
        split: how the parts were chosen, in words.
        fingerprint: SHA-256 (hex) of all tokens, of where documents begin and of the tokenizer.
        tokenizer: what made the tokens.
        folder: where the tokens are; None if they are in memory.
        lost: counts of what the tokens do not say of the text. ``skipped_rows``: rows without a text. ``unknown_tokens``: those
            for text that the tokenizer does not know. ``replaced_characters``: U+FFFD for bytes that are not UTF-8.
            ``uncertain_cuts``: places in long documents at which tokens may be others than uncut.
    """

    source: str
    train: Stream
    held_out: Stream
    train_documents: int
    held_out_documents: int
    train_bytes: int
    held_out_bytes: int
    split: str
    fingerprint: str
    tokenizer: Tokenizer = dataclasses.field(default=BYTES, compare=False)
    folder: Path | None = None
    lost: dict[str, int] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def unit(self) -> str:
        """What a token is called."""
        return "bytes" if self.tokenizer.is_bytes else "tokens"

    @property
    def tokens_per_byte(self) -> float:
        """Of the held-out text: bits of a token times it are bits of a byte."""
        return self.held_out.size / self.held_out_bytes

    @cached_property
    def documents(self) -> np.ndarray:
        """Where training documents begin: (documents,) int64."""
        if self.folder is None:
            raise ValueError("pack='documents' with a corpus that has no folder: expected one of read_corpus")
        return np.fromfile(self.folder / "train.documents", dtype="<i8")

    def describe(self) -> dict[str, object]:
        """The facts about the data that a run records."""
        facts: dict[str, object] = {"source": self.source}
        for part in _PARTS:
            facts |= {
                f"{part}_bytes": getattr(self, f"{part}_bytes"),
                f"{part}_documents": getattr(self, f"{part}_documents"),
            }
            if not self.tokenizer.is_bytes:
                facts[f"{part}_tokens"] = int(getattr(self, part).size)
        return {**facts, **self.lost, "split": self.split, "fingerprint": self.fingerprint}


def read_corpus(
    path: str | os.PathLike[str] | None = None,
    say: Say | None = None,
    *,
    tokenizer: str = "bytes",
    field: str = "text",
    folder: str | os.PathLike[str] | None = None,
    skip_bad_rows: bool = False,
) -> Corpus:
    """Read text, turn it into tokens and keep these in a folder.

    A folder is read whole: every regular file below it in sorted order, hidden names (a leading dot) left out, links to files and
    folders followed (see ``list_files``). A document is a file, or a row of a ``.jsonl`` or ``.parquet`` file or of a data set
    that ``datasets`` has saved. It is held out when the hash of its name (relative path, number of the row) falls in the lowest
    tenth, so the split depends on no seed, and a document stays in its part when others come or go. A single file of text has its
    last tenth held out. Token shards (``.bin``) are taken as they are. Files whose names end in ``.gz``, ``.bz2`` or ``.xz`` are
    decompressed while they are read.

    What a stop has interrupted goes on where it was when the same text is read into the same folder again. A folder that holds
    prepared data is not prepared again.

    Args:
        path: what to read; a folder of prepared data; ``None`` for the ``.py`` files of Python's own standard library, without
            its tests and generated files.
        say: called with a line of text before each slow step, for everything that is not read, and with the bytes so far
            when reading takes longer than two seconds.
        tokenizer: ``"bytes"``, a ``tokenizer.json`` or a folder that holds one, see ``read_tokenizer``.
        field: which field of a row is its text.
        folder: where the tokens are kept; ``None`` for a temporary folder that goes with the result.
        skip_bad_rows: leave out rows without such a text, and lines that are not JSON. ``say`` names the first, ``lost`` of the
            result counts them.

    Raises:
        ValueError: no data, too little to split, a file that is damaged or becomes shorter, a row without a text.
        ModuleNotFoundError: the library for a kind of file, or for a tokenizer, is missing.
        OSError: a file that cannot be read.
    """
    tell = say or (lambda text: None)
    if path is not None and is_prepared(path):
        corpus = open_corpus(path, tell)
        if tokenizer != "bytes" and read_tokenizer(tokenizer).digest != corpus.tokenizer.digest:
            raise ValueError(f"tokenizer={tokenizer!r} is not the one that data={os.fspath(path)!r} are prepared with")
        return corpus
    source = find_source(None if path is None else Path(path), field, tell, skip_bad_rows)
    made = read_tokenizer(tokenizer)
    if folder is not None:
        preparation = _Preparation(source, field, Path(folder), made, tell)
        if is_prepared(folder) and read_json(Path(folder) / "prepared.json").get("identity") == preparation.identity:
            return open_corpus(folder, tell)
        preparation.run()
        return open_corpus(folder, tell, check=False)
    temporary = Path(tempfile.mkdtemp(prefix="longnet-data-"))
    try:
        _Preparation(source, field, temporary, made, tell).run()
        corpus = open_corpus(temporary, tell, check=False)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    weakref.finalize(corpus, shutil.rmtree, temporary, ignore_errors=True)
    return corpus


def is_prepared(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds prepared data."""
    return (Path(folder) / "prepared.json").is_file()


def open_corpus(folder: str | os.PathLike[str], say: Say | None = None, check: bool = True) -> Corpus:
    """Prepared data; with ``check`` after all tokens have been compared with their digests.

    Raises:
        ValueError: no prepared data, or damaged ones.
    """
    place = Path(folder)
    if not is_prepared(place):
        raise ValueError(
            f"{str(folder)!r} holds no prepared data: expected a folder of longnet prepare, or a run's data folder"
        )
    facts = read_json(place / "prepared.json")
    if facts.get("format") != _FORMAT:
        raise ValueError(f"{place / 'prepared.json'} has the format {facts.get('format')!r}: expected {_FORMAT!r}")
    tokenizer = BYTES if facts["tokenizer"] == BYTES.digest else read_tokenizer(place)
    if tokenizer.digest != facts["tokenizer"]:
        raise ValueError(f"the tokenizer in {str(place)!r} is not the one that made its tokens")
    progress = _Progress(sum(facts["sizes"].values()), say or (lambda text: None), "Checked")
    for name, digest in facts["digests"].items():
        if not (place / name).is_file() or (check and _digest(place / name, progress).hexdigest() != digest):
            raise ValueError(f"{place / name} is missing or damaged: expected what was prepared; prepare the data anew")
    train, held_out = (TokensOnDisk(place / f"{part}.tokens", tokenizer.dtype) for part in _PARTS)
    counts = {f"{part}_{what}": facts[f"{part}_{what}"] for what in ("documents", "bytes") for part in _PARTS}
    about = {name: facts[name] for name in ("source", "split", "fingerprint")}
    lost = {name: facts[name] for name in _LOST if name in facts}
    return Corpus(train=train, held_out=held_out, tokenizer=tokenizer, folder=place, lost=lost, **counts, **about)


def check_lengths(corpus: Corpus, context: int) -> None:
    """Raise ValueError unless the training data fill a window of ``context`` tokens and 2 tokens are held out."""
    count_starts(corpus.train, context)
    if corpus.held_out.size < 2:
        raise ValueError(
            f"data={corpus.source!r} has {corpus.held_out.size} held-out token(s) in {corpus.held_out_documents} document(s): "
            "expected at least 2, as the first is not predicted"
        )


def remove_prepared(folder: str | os.PathLike[str]) -> None:
    """Remove prepared or half-prepared data, and the folder if nothing else is in it."""
    place = Path(folder)
    names = [f"{part}.{what}" for part in _PARTS for what in ("tokens", "documents")]
    for name in ("prepared.json", "unfinished.json", *TOKENIZER_FILES, *names):
        (place / name).unlink(missing_ok=True)
    if place.is_dir() and not any(place.iterdir()):
        place.rmdir()


class _Preparation:
    """One pass over a source. After every batch the sizes of the files are written down: what comes after them is cut off."""

    def __init__(self, source: Source, field: str, folder: Path, tokenizer: Tokenizer, say: Say) -> None:
        self.source, self.folder, self.tokenizer, self.say = source, folder, tokenizer, say
        about = [_FORMAT, _PREPARATION, str(source.place.resolve()), source.state, tokenizer.digest, field]
        self.identity = hashlib.sha256(json.dumps(about).encode("utf-8", "surrogateescape")).hexdigest()
        self.unfinished = folder / "unfinished.json"
        self.done: dict[str, Any] = {"identity": self.identity, "pieces": 0, "read": 0, "rest": ""}
        self.done |= dict.fromkeys(_LOST, 0)
        self.done |= {f"{part}_{what}": 0 for part in _PARTS for what in ("tokens", "documents", "bytes")}

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "prepared.json").unlink(missing_ok=True)
        if self.unfinished.is_file() and (before := read_json(self.unfinished)).get("identity") == self.identity:
            self.done = before
            self.say(f"Going on after {before['read']:,} bytes that are prepared already")
        files = {name: self._open(name) for part in _PARTS for name in (f"{part}.tokens", f"{part}.documents")}
        self.digests = {name: _digest(self.folder / name) for name in files}
        progress = _Progress(self.source.total, self.say, "Prepared")
        try:
            for batch in self._batches():
                self._write(batch, files)
                progress.at(self.done["read"])
        finally:
            for file in files.values():
                file.close()
        self._finish()

    def _open(self, name: str) -> Any:
        """A file cut to what was written down."""
        part, what = name.rsplit(".", 1)
        size = self.done[f"{part}_{what}"] * (8 if what == "documents" else np.dtype(self.tokenizer.dtype).itemsize)
        path = self.folder / name
        path.touch()
        if path.stat().st_size < size:
            raise ValueError(
                f"{path} is shorter than {self.unfinished} says: remove {str(self.folder)!r} to prepare anew"
            )
        os.truncate(path, size)
        return open(path, "ab")

    def _batches(self) -> Iterator[list[Piece]]:
        """Pieces that were not prepared before, about 16 MiB together."""
        batch: list[Piece] = []
        size = 0
        for number, piece in enumerate(self.source.pieces()):
            if number < self.done["pieces"]:
                continue
            batch.append(piece)
            size += len(piece.content)
            if size >= _CHUNK or len(batch) >= 1 << 14:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _write(self, batch: list[Piece], files: dict[str, Any]) -> None:
        encoded = iter(self.tokenizer.encode(self._cut(batch)))
        new: dict[str, list[bytes]] = {name: [] for name in files}
        for piece in batch:
            part = _PARTS[piece.held_out]
            if isinstance(piece.content, bytes):
                tokens, text = next(encoded), piece.content
                self.done["replaced_characters"] += 0 if self.tokenizer.is_bytes else _count_replaced(text)
            else:
                tokens = self._of_shard(piece)
                text = self.tokenizer.decode(tokens)
            if piece.begins:
                new[f"{part}.documents"].append(np.int64(self.done[f"{part}_tokens"]).tobytes())
                self.done[f"{part}_documents"] += 1
            if piece.ends and self.tokenizer.end is not None:
                tokens = np.append(tokens, np.array(self.tokenizer.end, dtype=tokens.dtype))
            if self.tokenizer.unknown is not None:
                self.done["unknown_tokens"] += int((tokens == self.tokenizer.unknown).sum())
            new[f"{part}.tokens"].append(tokens.tobytes())
            self.done[f"{part}_tokens"] += tokens.size
            self.done[f"{part}_bytes"] += len(text)
            self.done["read"] += np.frombuffer(piece.content, dtype=np.uint8).size
        self.done["pieces"] += len(batch)
        for name, file in files.items():
            content = b"".join(new[name])
            self.digests[name].update(content)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        write_json(self.unfinished, self.done)

    def _cut(self, batch: list[Piece]) -> list[bytes]:
        """What is encoded of each piece: what is left of the one before, and all or, within a document, all to a place at which a
        cut changes no token."""
        texts, rest = [], bytes.fromhex(self.done["rest"])
        for piece in batch:
            if isinstance(piece.content, bytes):
                text = rest + piece.content
                place = len(text) if piece.ends else self.tokenizer.last_place(text)
                self.done["uncertain_cuts"] += place == 0 < len(text)
                texts.append(text[: place or None])
                rest = text[place or len(text) :]
        self.done["rest"] = rest.hex()
        return texts

    def _of_shard(self, piece: Piece) -> np.ndarray:
        tokens = np.asarray(piece.content)
        if (most := int(tokens.max(initial=0))) >= self.tokenizer.vocab_size:
            raise ValueError(
                f"{piece.name} holds the token {most}, the tokenizer has {self.tokenizer.vocab_size}: "
                "expected --tokenizer to be the one that made the shards"
            )
        return tokens.astype(self.tokenizer.dtype)

    def _finish(self) -> None:
        for part in _PARTS:
            if not self.done[f"{part}_tokens"]:
                found = self.done["train_documents"] + self.done["held_out_documents"]
                raise ValueError(
                    f"data={str(self.source.place)!r} has {found} documents with text, none of them "
                    f"{'held out' if part == 'held_out' else 'to train on'} ({self.source.split}): expected more documents"
                )
        self.done["skipped_rows"] = self.source.bad_rows.count
        self._say_lost()
        self.tokenizer.save(self.folder)
        digests = {name: digest.hexdigest() for name, digest in self.digests.items()}
        sizes = {name: (self.folder / name).stat().st_size for name in digests}
        fingerprint = hashlib.sha256("".join([self.tokenizer.digest, *digests.values()]).encode()).hexdigest()
        facts = {name: value for name, value in self.done.items() if name.startswith(_PARTS) or name in _LOST}
        about = {
            "format": _FORMAT,
            "source": str(self.source.place),
            "split": self.source.split,
            "fingerprint": fingerprint,
        }
        prepared = {
            **about,
            "identity": self.identity,
            "tokenizer": self.tokenizer.digest,
            **facts,
            "sizes": sizes,
            "digests": digests,
        }
        write_json(self.folder / "prepared.json", prepared)
        self.unfinished.unlink()

    def _say_lost(self) -> None:
        done = self.done
        tokens, size = (sum(done[f"{part}_{what}"] for part in _PARTS) for what in ("tokens", "bytes"))
        if done["skipped_rows"]:
            self.say(self.source.bad_rows.describe())
        if count := done["unknown_tokens"]:
            self.say(
                f"{count:,} of {tokens:,} tokens ({count / tokens:.2%}) stand for text that the tokenizer does not know"
            )
        if count := done["replaced_characters"]:
            self.say(
                f"{count:,} replacement characters ({count / size:.4%} of {size:,} bytes) stand for bytes that are not UTF-8"
            )
        if count := done["uncertain_cuts"]:
            self.say(
                f"{count:,} cut(s) in documents of more than {_CHUNK >> 20} MiB: tokens there may be others than uncut, as this "
                "tokenizer or text has no place where they cannot be"
            )


def _count_replaced(text: bytes) -> int:
    """Replacement characters that stand for bytes of a text that are not UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return text.decode("utf-8", "replace").count("\ufffd") - text.count("\ufffd".encode())
    return 0


def _digest(path: Path, progress: _Progress | None = None) -> hashlib._Hash:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if progress is not None:
                progress.add(len(chunk))
    return digest


class _Progress:
    """Says how far something is: after two seconds, then ever more rarely, once a minute at last."""

    def __init__(self, total: int, say: Say, verb: str) -> None:
        self._total, self._say, self._verb = total, say, verb
        self._done, self._wait = 0, 2.0
        self._due = time.monotonic() + self._wait

    def add(self, count: int) -> None:
        self.at(self._done + count)

    def at(self, done: int) -> None:
        self._done = done
        if time.monotonic() >= self._due:
            self._say(f"{self._verb} {done:,}{f' of {self._total:,}' if self._total else ''} bytes")
            self._wait = min(2 * self._wait, 60.0)
            self._due = time.monotonic() + self._wait
