"""``longnet prepare`` and ``longnet tokenizer train``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

_DATA = typer.Option(help="File or folder of text, JSON lines, Parquet, or a data set that datasets has saved.")
_FIELD = typer.Option(help="Which field of a row is its text.")
_SKIP = typer.Option("--skip-bad-rows", help="Leave out rows without such a text, and count them.")


def prepare(
    data: Annotated[Path, _DATA],
    out: Annotated[Path, typer.Option(help="Folder to make, for the --data of longnet train.")],
    tokenizer: Annotated[str, typer.Option(help="bytes, a tokenizer.json, or a folder that holds one.")] = "bytes",
    field: Annotated[str, _FIELD] = "text",
    skip_bad_rows: Annotated[bool, _SKIP] = False,
) -> None:
    """Turn text into a folder of tokens, once for many runs. What a stop has interrupted, the same command goes on with."""
    from longnet.training.data import check_outside, is_prepared, read_corpus
    from longnet.training.lock import locked
    from longnet.training.progress import make_reporter

    reporter = make_reporter()
    with locked(out):
        for name, place in (("data", data), ("out", out)):
            if is_prepared(place):
                raise ValueError(f"{name}={str(place)!r} holds prepared data already: expected another folder")
        check_outside(str(data), str(out))
        corpus = read_corpus(
            data, reporter.say, tokenizer=tokenizer, field=field, folder=out, skip_bad_rows=skip_bad_rows
        )
    reporter.say(
        f"{corpus.train.size:,} training {corpus.unit} of {corpus.train_documents:,} documents, {corpus.held_out.size:,} of "
        f"{corpus.held_out_documents:,} held out ({corpus.split}). To train: longnet train --data {out} --out RUN"
    )


tokenizers = typer.Typer(no_args_is_help=True, help="Make a tokenizer.")


@tokenizers.command("train")
def train(
    data: Annotated[Path | None, typer.Option(help=_DATA.help, show_default="Python's standard library source")] = None,
    vocab: Annotated[int, typer.Option(help="Tokens of the vocabulary.")] = 32_768,
    out: Annotated[Path, typer.Option(help="Folder to write tokenizer.json into.")] = Path("tokenizer"),
    field: Annotated[str, _FIELD] = "text",
    megabytes: Annotated[int, typer.Option(help="Most text to learn from; what is held out is not.")] = 1000,
    skip_bad_rows: Annotated[bool, _SKIP] = False,
) -> None:
    """Train a byte-level BPE on text, with the tokenizers library."""
    from longnet.training.data import find_source, train_tokenizer
    from longnet.training.progress import make_reporter, task

    if out.exists() and (out / "tokenizer.json").exists():
        raise ValueError(f"out={str(out)!r} holds a tokenizer.json: expected another folder")
    if megabytes < 1:
        raise ValueError(f"megabytes={megabytes}: expected at least 1")
    reporter, most = make_reporter(), megabytes * 1_000_000
    source = find_source(data, field, reporter.say, skip_bad_rows)

    def texts() -> Iterator[bytes]:
        read = 0
        for piece in source.pieces():
            if read >= most:
                return
            if isinstance(piece.content, bytes) and not piece.held_out:
                yield piece.content[: most - read]
                read += len(piece.content)
                reporter.advance(min(1.0, read / min(most, source.total or most)))

    with task(reporter, f"Training a vocabulary of {vocab:,}"):
        made = train_tokenizer(texts(), vocab)
    if source.bad_rows.count:
        reporter.say(source.bad_rows.describe())
    out.mkdir(parents=True, exist_ok=True)
    made.save(out)
    reporter.say(
        f"{made.vocab_size:,} tokens, in {out / 'tokenizer.json'}. To train: longnet train --tokenizer {out} --out RUN"
    )
