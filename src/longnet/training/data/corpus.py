"""Prepared data: documents turned into tokens once, in a folder that training reads."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from longnet.training.data.preparation import (
    FORMAT,
    LOST,
    PARTS,
    Preparation,
    Progress,
    Say,
    digest_file,
    remove_files,
)
from longnet.training.data.sources import check_no_row_options, find_source
from longnet.training.data.stream import Stream, TokensOnDisk, count_starts
from longnet.training.data.tokenizer import BYTES, Tokenizer, read_tokenizer
from longnet.training.files import read_json


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
        shard_ends: how many training tokens end a document, of shards of tokens; None of text.
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
    shard_ends: int | None = None

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
        for part in PARTS:
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
    last tenth held out. Token shards (``.bin``) are taken as they are; documents in them end at the tokenizer's token for it.
    Parquet is known by its first bytes, and Arrow files are no text. Files whose names end in ``.gz``, ``.bz2`` or ``.xz`` are
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
        ValueError: no data, too little to split, a file that is damaged or becomes shorter, a row without a text, a folder that
            holds something else, options that do nothing with these data.
        ModuleNotFoundError: the library for a kind of file, or for a tokenizer, is missing.
        OSError: a file that cannot be read.
    """
    tell = say or (lambda text: None)
    if path is not None and not os.fspath(path):
        raise ValueError("data='': expected a file or a folder")
    if path is not None and is_prepared(path):
        check_no_row_options(os.fspath(path), "is prepared already", field, skip_bad_rows)
        corpus = open_corpus(path, tell)
        if tokenizer != "bytes" and read_tokenizer(tokenizer).digest != corpus.tokenizer.digest:
            raise ValueError(f"tokenizer={tokenizer!r} is not the one that data={os.fspath(path)!r} are prepared with")
        return corpus
    source = find_source(None if path is None else Path(path), field, tell, skip_bad_rows)
    made = read_tokenizer(tokenizer)
    if folder is not None:
        preparation = Preparation(source, field, Path(folder), made, tell)
        if is_prepared(folder) and read_json(Path(folder) / "prepared.json").get("identity") == preparation.identity:
            return open_corpus(folder, tell)
        preparation.run()
        return open_corpus(folder, tell, check=False)
    temporary = Path(tempfile.mkdtemp(prefix="longnet-data-"))
    try:
        Preparation(source, field, temporary, made, tell).run()
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
    if facts.get("format") != FORMAT:
        raise ValueError(f"{place / 'prepared.json'} has the format {facts.get('format')!r}: expected {FORMAT!r}")
    tokenizer = BYTES if facts["tokenizer"] == BYTES.digest else read_tokenizer(place)
    if tokenizer.digest != facts["tokenizer"]:
        raise ValueError(f"the tokenizer in {str(place)!r} is not the one that made its tokens")
    progress = Progress(sum(facts["sizes"].values()), say or (lambda text: None), "Checked")
    for name, digest in facts["digests"].items():
        size = (place / name).stat().st_size if (place / name).is_file() else None
        wrong = "" if size == facts["sizes"][name] else "is missing" if size is None else f"holds {size:,} bytes"
        if not wrong and check and digest_file(place / name, progress).hexdigest() != digest:
            wrong = "is damaged: its content does not match its digest"
        if wrong:
            raise ValueError(
                f"{place / name} {wrong}, expected the {facts['sizes'][name]:,} bytes that were prepared; prepare the data anew"
            )
    train, held_out = (TokensOnDisk(place / f"{part}.tokens", tokenizer.dtype) for part in PARTS)
    counts = {f"{part}_{what}": facts[f"{part}_{what}"] for what in ("documents", "bytes") for part in PARTS}
    about = {name: facts[name] for name in ("source", "split", "fingerprint")}
    lost, ends = {name: facts[name] for name in LOST if name in facts}, facts.get("shard_ends")
    return Corpus(
        train=train, held_out=held_out, tokenizer=tokenizer, folder=place, lost=lost, shard_ends=ends, **counts, **about
    )


def check_lengths(corpus: Corpus, context: int) -> None:
    """Raise ValueError unless the training data fill a window of ``context`` tokens and 2 tokens are held out."""
    count_starts(corpus.train, context)
    if corpus.held_out.size < 2:
        raise ValueError(
            f"data={corpus.source!r} has {corpus.held_out.size} held-out token(s) in {corpus.held_out_documents} document(s): "
            "expected at least 2, as the first is not predicted"
        )


def check_documents(corpus: Corpus) -> None:
    """Raise ValueError if ``pack="documents"`` cannot tell the documents of shards apart."""
    if corpus.shard_ends is None or corpus.shard_ends > 0:
        return
    end = corpus.tokenizer.end
    if end is None:
        reason = "whose tokenizer has no token that ends a document"
    else:
        name = corpus.tokenizer.reader(np.empty(0, dtype=corpus.tokenizer.dtype))(end).decode()
        reason = f"in which the token that ends a document, {name!r} ({end}), does not occur"
    raise ValueError(
        f"pack='documents' with data={corpus.source!r}, shards of tokens {reason}: expected shards with such tokens"
    )


def remove_prepared(folder: str | os.PathLike[str]) -> None:
    """Remove prepared or half-prepared data, and the folder if nothing else is in it."""
    place = Path(folder)
    remove_files(place)
    if place.is_dir() and not any(place.iterdir()):
        place.rmdir()
