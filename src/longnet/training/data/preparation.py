"""Turning text into tokens in a folder, so that a stop at any moment loses two batches of 16 MiB of text at most."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from longnet.training.data.rows import BadRow
from longnet.training.data.sources import Piece, Source, list_names
from longnet.training.data.tokenizer import TOKENIZER_FILES, Tokenizer
from longnet.training.data.workers import Workers
from longnet.training.files import read_json, write_json

_CHUNK = 1 << 24
FORMAT = "longnet-data-1"
PARTS = ("train", "held_out")
LOST = ("skipped_rows", "unknown_tokens", "replaced_characters", "uncertain_cuts")
_PREPARATION = 3  # Another number does not go on with what an older version has half prepared.
Say = Callable[[str], None]
_CHANGES = {
    "version": "by another version of longnet",
    "place": "from other data",
    "state": "before the data changed",
    "tokenizer": "with another tokenizer",
    "field": "from another field",
}
"""Why a preparation does not go on with another one: by the entry of ``Preparation.about`` that differs."""


class Preparation:
    """One pass over a source. After every batch the sizes of the files are written down: what comes after them is cut off."""

    def __init__(self, source: Source, field: str, folder: Path, tokenizer: Tokenizer, say: Say) -> None:
        self.source, self.folder, self.tokenizer, self.say = source, folder, tokenizer, say
        self.about = {
            "version": f"{FORMAT}, {_PREPARATION}",
            "place": str(source.place.resolve()),
            "state": _digest_of(source.state),
            "tokenizer": tokenizer.digest,
            "field": field,
        }
        self.identity = _digest_of(self.about)
        self.unfinished = folder / "unfinished.json"
        self.done: dict[str, Any] = {"identity": self.identity, "about": self.about, "pieces": 0, "read": 0, "rest": ""}
        # Of shards: training tokens that end a document, and whether the last token does.
        self.done |= {"shard_ends": 0, "has_ended": False}
        self.done |= dict.fromkeys(LOST, 0)
        self.done |= {f"{part}_{what}": 0 for part in PARTS for what in ("tokens", "documents", "bytes")}

    def run(self) -> None:
        """Prepare; a refusal leaves nothing behind, but where the same command goes on without bad rows.

        Raises:
            ValueError: the folder holds something else, or what reading the source raises.
        """
        check_free(self.folder, "folder")
        made = [one for one in (self.folder, *self.folder.parents) if not one.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        goes_on = self._begin()
        try:
            self._prepare()
        except (ValueError, ModuleNotFoundError) as error:
            if not goes_on and not (isinstance(error, BadRow) and self.done["pieces"]):
                remove_files(self.folder)
                for one in made:
                    if not any(one.iterdir()):
                        one.rmdir()
            raise

    def _begin(self) -> bool:
        """Whether it goes on with what was half prepared; say so, or why it does not."""
        finished = self.folder / "prepared.json"
        before = next((read_json(one) for one in (finished, self.unfinished) if one.is_file()), None)
        goes_on = before is not None and not finished.is_file() and before.get("identity") == self.identity
        if before is not None and goes_on:
            self.done = before
            self.say(f"Going on after {before['read']:,} bytes that are prepared already")
            return True
        if before is not None:
            about = before.get("about", {**self.about, "version": ""})
            changes = [name for name in _CHANGES if about.get(name) != self.about[name]]
            why = " and ".join(_CHANGES[name] for name in changes if name != "state" or "place" not in changes)
            self.say(f"Starting over: what {self.folder} holds was prepared {why or 'before'}")
        # From now on the folder is known to be one of prepared data.
        write_json(self.unfinished, self.done)
        finished.unlink(missing_ok=True)
        return False

    def _prepare(self) -> None:
        files = {name: self._open(name) for part in PARTS for name in (f"{part}.tokens", f"{part}.documents")}
        self.digests = {name: digest_file(self.folder / name) for name in files}
        progress = Progress(self.source.total, self.say, "Prepared")
        try:
            with Workers(self.tokenizer) as workers:
                for batch, encoded, cut in self._encoded(workers):
                    self._write(batch, encoded, cut, files)
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

    def _encoded(self, workers: Workers) -> Iterator[tuple[list[Piece], Iterator[np.ndarray], dict[str, Any]]]:
        """Each batch, its tokens, and what to write down of its cuts; the next one is encoded meanwhile.

        A piece that does not end its document is cut where a cut changes no token; the next piece begins with the rest.
        """
        rest, uncertain, before = bytes.fromhex(self.done["rest"]), self.done["uncertain_cuts"], None
        for batch in self._batches():
            texts = []
            for piece in batch:
                if isinstance(piece.content, bytes):
                    text = rest + piece.content
                    place = len(text) if piece.ends else self.tokenizer.last_place(text)
                    uncertain += place == 0 < len(text)
                    texts.append(text[: place or None])
                    rest = text[place or len(text) :]
            following = batch, workers.encode(texts), {"rest": rest.hex(), "uncertain_cuts": uncertain}
            if before is not None:
                yield before
            before = following
        if before is not None:
            yield before

    def _write(
        self, batch: list[Piece], encoded: Iterator[np.ndarray], cut: dict[str, Any], files: dict[str, Any]
    ) -> None:
        new: dict[str, list[bytes]] = {name: [] for name in files}
        for piece in batch:
            part = PARTS[piece.held_out]
            if isinstance(piece.content, bytes):
                tokens, text = next(encoded), piece.content
                self.done["replaced_characters"] += 0 if self.tokenizer.is_bytes else _count_replaced(text)
            else:
                tokens = self._of_shard(piece)
                text = self.tokenizer.decode(tokens)
            begins = (
                np.zeros(int(piece.begins), np.int64)
                if isinstance(piece.content, bytes)
                else self._begins(piece, tokens)
            )
            new[f"{part}.documents"].append((self.done[f"{part}_tokens"] + begins).tobytes())
            self.done[f"{part}_documents"] += begins.size
            if piece.ends and self.tokenizer.end is not None:
                tokens = np.append(tokens, np.array(self.tokenizer.end, dtype=tokens.dtype))
            if self.tokenizer.unknown is not None:
                self.done["unknown_tokens"] += int((tokens == self.tokenizer.unknown).sum())
            new[f"{part}.tokens"].append(tokens.tobytes())
            self.done[f"{part}_tokens"] += tokens.size
            self.done[f"{part}_bytes"] += len(text)
            self.done["read"] += np.frombuffer(piece.content, dtype=np.uint8).size
        self.done["pieces"] += len(batch)
        self.done |= cut
        for name, file in files.items():
            content = b"".join(new[name])
            self.digests[name].update(content)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        write_json(self.unfinished, self.done)

    def _begins(self, piece: Piece, tokens: np.ndarray) -> np.ndarray:
        """Where documents begin in a piece of a shard: with the shard, and after each token that ends one."""
        is_end = np.zeros(tokens.size, bool) if self.tokenizer.end is None else tokens == self.tokenizer.end
        begins = np.append(piece.begins or self.done["has_ended"], is_end[:-1])
        self.done["has_ended"] = bool(is_end[-1])
        self.done["shard_ends"] += 0 if piece.held_out else int(is_end.sum())
        return np.flatnonzero(begins)

    def _of_shard(self, piece: Piece) -> np.ndarray:
        tokens = np.asarray(piece.content)
        if (most := int(tokens.max(initial=0))) >= self.tokenizer.vocab_size:
            raise ValueError(
                f"{piece.name} holds the token {most}, the tokenizer has {self.tokenizer.vocab_size}: "
                "expected --tokenizer to be the one that made the shards"
            )
        return tokens.astype(self.tokenizer.dtype)

    def _finish(self) -> None:
        for part in PARTS:
            if not self.done[f"{part}_tokens"]:
                found = self.done["train_documents"] + self.done["held_out_documents"]
                raise ValueError(
                    f"data={str(self.source.place)!r} has {found} documents with text, none of them "
                    f"{'held out' if part == 'held_out' else 'to train on'} ({self.source.split}): expected more documents"
                    + (f". {self.source.bad_rows.describe()}" if self.source.bad_rows.count else "")
                )
        self.done["skipped_rows"] = self.source.bad_rows.count
        self._say_lost()
        self.tokenizer.save(self.folder)
        digests = {name: digest.hexdigest() for name, digest in self.digests.items()}
        sizes = {name: (self.folder / name).stat().st_size for name in digests}
        fingerprint = hashlib.sha256("".join([self.tokenizer.digest, *digests.values()]).encode()).hexdigest()
        facts = {name: value for name, value in self.done.items() if name.startswith(PARTS) or name in LOST}
        about = {
            "format": FORMAT,
            "source": str(self.source.place),
            "split": self.source.split,
            "fingerprint": fingerprint,
        }
        prepared = {
            **about,
            "identity": self.identity,
            "about": self.about,
            "tokenizer": self.tokenizer.digest,
            **facts,
            **({"shard_ends": self.done["shard_ends"]} if self.source.is_tokens else {}),
            "sizes": sizes,
            "digests": digests,
        }
        write_json(self.folder / "prepared.json", prepared)
        self.unfinished.unlink()

    def _say_lost(self) -> None:
        done = self.done
        tokens, size = (sum(done[f"{part}_{what}"] for part in PARTS) for what in ("tokens", "bytes"))
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


def check_free(folder: Path, name: str) -> None:
    """Raise ValueError for a folder with files that are not of a preparation; ``name`` is that of the argument."""
    if not folder.is_dir() or any((folder / one).is_file() for one in ("prepared.json", "unfinished.json")):
        return
    if others := sorted(one.name for one in folder.iterdir() if not one.name.startswith(".")):
        raise ValueError(
            f"{name}={str(folder)!r} holds {list_names(others)}: expected a new or empty folder, or one of a preparation "
            "that was interrupted"
        )


def remove_files(folder: Path) -> None:
    """Remove prepared or half-prepared data from a folder."""
    names = [f"{part}.{what}" for part in PARTS for what in ("tokens", "documents")]
    # The files by which the folder is known as one of prepared data come last.
    for name in (*names, *TOKENIZER_FILES, "prepared.json", "unfinished.json"):
        (folder / name).unlink(missing_ok=True)


def _digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode("utf-8", "surrogateescape")).hexdigest()


def _count_replaced(text: bytes) -> int:
    """Replacement characters that stand for bytes of a text that are not UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return text.decode("utf-8", "replace").count("\ufffd") - text.count("\ufffd".encode())
    return 0


def digest_file(path: Path, progress: Progress | None = None) -> Any:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if progress is not None:
                progress.add(len(chunk))
    return digest


class Progress:
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
