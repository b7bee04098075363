"""``longnet prepare`` and ``longnet tokenizer train``."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from longnet.cli.options import one_data, path_option

_HELP = "File or folder of text, JSON lines, Parquet, or a data set that datasets has saved."
_DATA = path_option(help=_HELP)
_FIELD = typer.Option(help="Which field of a row is its text.")
_SKIP = typer.Option("--skip-bad-rows", help="Leave out rows without such a text, and count them.")


def prepare(
    data: Annotated[list[Path], _DATA],
    out: Annotated[Path, path_option(help="Folder to make, for the --data of longnet train.")],
    tokenizer: Annotated[str, typer.Option(help="bytes, a tokenizer.json, or a folder that holds one.")] = "bytes",
    field: Annotated[str, _FIELD] = "text",
    skip_bad_rows: Annotated[bool, _SKIP] = False,
) -> None:
    """Turn text into a folder of tokens, once for many runs. What a stop has interrupted, the same command goes on with."""
    from longnet.training.data import check_free, check_outside, is_prepared, read_corpus
    from longnet.training.lock import locked
    from longnet.training.progress import make_reporter

    reporter, path = make_reporter(), one_data(data)
    assert path is not None
    with locked(out):
        for name, place in (("data", path), ("out", out)):
            if is_prepared(place):
                raise ValueError(f"{name}={str(place)!r} holds prepared data already: expected another folder")
        check_outside(str(path), str(out))
        check_free(out, "out")
        corpus = read_corpus(
            path, reporter.say, tokenizer=tokenizer, field=field, folder=out, skip_bad_rows=skip_bad_rows
        )
    reporter.say(
        f"{corpus.train.size:,} training {corpus.unit} of {corpus.train_documents:,} documents, {corpus.held_out.size:,} of "
        f"{corpus.held_out_documents:,} held out ({corpus.split}). To train: "
        + shlex.join(["longnet", "train", "--data", str(out), "--out", "RUN"])
    )


tokenizers = typer.Typer(no_args_is_help=True, help="Make a tokenizer.")


@tokenizers.command("train")
def train(
    data: Annotated[
        list[Path] | None,
        path_option(help=_HELP, show_default="Python's standard library source"),
    ] = None,
    vocab: Annotated[int, typer.Option(help="Tokens of the vocabulary.")] = 32_768,
    out: Annotated[Path, path_option(help="Folder to write tokenizer.json into.")] = Path("tokenizer"),
    field: Annotated[str, _FIELD] = "text",
    megabytes: Annotated[int, typer.Option(help="Most text to learn from; what is held out is not.")] = 1000,
    skip_bad_rows: Annotated[bool, _SKIP] = False,
) -> None:
    """Train a byte-level BPE on text, with the tokenizers library."""
    from longnet.training.data import TOKENIZER_FILES, check_outside, find_source, train_tokenizer
    from longnet.training.lock import locked
    from longnet.training.progress import make_reporter, task

    if megabytes < 1:
        raise ValueError(f"megabytes={megabytes}: expected at least 1")
    path, reporter, most = one_data(data), make_reporter(), megabytes * 1_000_000
    with locked(out):
        for name in TOKENIZER_FILES:
            if (out / name).exists():
                raise ValueError(f"out={str(out)!r} holds a {name}: expected another folder")
        check_outside(None if path is None else str(path), str(out))
        source = find_source(path, field, reporter.say, skip_bad_rows)
        if source.is_tokens:
            raise ValueError(f"data={str(path)!r} holds shards of tokens: expected text")

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
            reporter.advance(1.0)
        if source.bad_rows.count:
            reporter.say(source.bad_rows.describe())
        made.save(out)
    reporter.say(
        f"{made.vocab_size:,} tokens, in {out / 'tokenizer.json'}. To train: "
        + shlex.join(["longnet", "train", "--tokenizer", str(out), "--out", "RUN"])
    )
