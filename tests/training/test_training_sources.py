"""Compressed files, rows without a text, text that a tokenizer cannot hold, and prepared folders by other paths."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from longnet.training import TrainSettings, load_model, save_model, train
from longnet.training.data import corpus, find_source, open_corpus, read_corpus, read_tokenizer, sources
from longnet.training.data import preparation as prepared

PACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
TEXT = "".join(f"line {n}: caf\u00e9\n" for n in range(3000)).encode()


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_text_is_the_text(
    suffix: str, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_PIECE", 999)
    (tmp_path / "one.txt").write_bytes(TEXT)
    (tmp_path / f"one.txt{suffix}").write_bytes(PACK[suffix](TEXT))
    plain, packed = read_corpus(tmp_path / "one.txt"), read_corpus(tmp_path / f"one.txt{suffix}")
    assert packed.fingerprint == plain.fingerprint and packed.train[:].tobytes() + packed.held_out[:].tobytes() == TEXT
    (text_folder / f"packed.txt{suffix}").write_bytes(PACK[suffix](TEXT))
    corpus = read_corpus(text_folder)
    assert TEXT in corpus.train[:].tobytes() + corpus.held_out[:].tobytes()
    for content in (PACK[suffix](TEXT)[:-20], b"no " + PACK[suffix](TEXT)):
        (text_folder / f"packed.txt{suffix}").write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"packed\.txt{suffix} cannot be decompressed .*: expected a whole {suffix} file"
        ):
            read_corpus(text_folder)


@pytest.mark.parametrize("name", ["a.zip", "b.zst", "C.TAR.GZ", "d.tgz"])
def test_an_archive_is_named_and_not_read(name: str, text_folder: Path) -> None:
    before = read_corpus(text_folder).fingerprint
    (text_folder / name).write_bytes(TEXT)
    said: list[str] = []
    assert read_corpus(text_folder, said.append).fingerprint == before
    assert f"Not read: {text_folder / name} is an archive" in said
    with pytest.raises(ValueError, match=rf"{name}' is an archive: expected it unpacked, or one of text alone \(.gz"):
        read_corpus(text_folder / name)


def rows(count: int) -> list[str]:
    return [json.dumps({"text": f"text {n}", "id": n}) for n in range(count)]


@pytest.mark.parametrize("suffix", ["", *PACK])
def test_rows_without_a_text_are_refused_or_counted_and_named(suffix: str, tmp_path: Path) -> None:
    lines = rows(60)
    lines[7], lines[20], lines[33] = '{"text": "half', '{"text": null}', "[1]"
    lines.insert(40, "")
    (tmp_path / "good.jsonl").write_text("\n".join(rows(5)))
    bad = tmp_path / f"rows.jsonl{suffix}"
    bad.write_bytes((PACK[suffix] if suffix else bytes)("\n".join(lines).encode()))
    with pytest.raises(
        ValueError, match=r"field='text': .*rows\.jsonl.*:8 is not JSON \(.*--skip-bad-rows leaves out such"
    ):
        read_corpus(tmp_path)
    said: list[str] = []
    corpus = read_corpus(tmp_path, said.append, skip_bad_rows=True)
    assert corpus.train_documents + corpus.held_out_documents == 62 and corpus.describe()["skipped_rows"] == 3
    (line,) = [line for line in said if line.startswith("Skipped")]
    assert line.startswith(f"Skipped 3 row(s) without a text in 'text': {bad}:8 is not JSON (")
    assert f"{bad}:21 has 'text' (NoneType)" in line and f"{bad}:34 has a list" in line


def test_a_preparation_that_a_bad_row_ended_goes_on_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "_CHUNK", 100)
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows(80), "{}", "", "{}"]))
    with pytest.raises(ValueError, match=r"rows\.jsonl:81 has a dict"):
        read_corpus(tmp_path / "rows.jsonl", folder=tmp_path / "data")
    said: list[str] = []
    corpus = read_corpus(tmp_path / "rows.jsonl", said.append, folder=tmp_path / "data", skip_bad_rows=True)
    assert any(line.startswith("Going on after") for line in said) and corpus.lost["skipped_rows"] == 2
    assert corpus.fingerprint == read_corpus(tmp_path / "rows.jsonl", skip_bad_rows=True).fingerprint


def test_bad_rows_of_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [None if n == 5 else f"text {n}" for n in range(60)]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a[1].parquet")
    with pytest.raises(ValueError, match=r"a\[1\]\.parquet, row 6 has 'text' \(NoneType\), expected a text"):
        read_corpus(tmp_path)
    parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "b.parquet")
    corpus = read_corpus(tmp_path, skip_bad_rows=True)
    assert corpus.lost["skipped_rows"] == 61 and corpus.train_documents + corpus.held_out_documents == 59
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a[1].parquet").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"b\.parquet is damaged after row 0"):
        read_corpus(tmp_path, skip_bad_rows=True)


def test_text_that_the_tokenizer_cannot_hold_is_counted_and_said_once(text_folder: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.WordLevel({"[UNK]": 0, "line": 1, "of": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    (text_folder / "a" / "broken.txt").write_bytes(b"caf\xe9 of \xff\xfe and \xef\xbf\xbd")
    said: list[str] = []
    corpus = read_corpus(text_folder, said.append, tokenizer=str(tmp_path / "tokenizer.json"))
    found = np.concatenate([corpus.train[:], corpus.held_out[:]])
    unknown = int((found == 0).sum())
    assert 0 < unknown < len(found) and corpus.tokenizer.unknown == 0
    facts = corpus.describe()
    assert (facts["unknown_tokens"], facts["replaced_characters"]) == (unknown, 3)
    assert [line for line in said if "tokenizer does not know" in line or "not UTF-8" in line] == [
        f"{unknown:,} of {len(found):,} tokens ({unknown / len(found):.2%}) stand for text that the tokenizer does not know",
        f"3 replacement characters ({3 / (corpus.train_bytes + corpus.held_out_bytes):.4%} of "
        f"{corpus.train_bytes + corpus.held_out_bytes:,} bytes) stand for bytes that are not UTF-8",
    ]
    assert set(read_corpus(text_folder).lost.values()) == {0}


def test_a_path_may_be_spelled_in_several_ways(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_corpus(text_folder, folder=tmp_path / "data")
    identity = json.loads((tmp_path / "data" / "prepared.json").read_text())["identity"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("text")
    for path in ("text", "text/", "./text", f"{text_folder}/", "a/../text", "link"):
        (tmp_path / "a").mkdir(exist_ok=True)
        said: list[str] = []
        read_corpus(path, said.append, folder=tmp_path / "data")
        assert json.loads((tmp_path / "data" / "prepared.json").read_text())["identity"] == identity


def test_a_start_reads_the_tokens_once(
    make_settings: Callable[..., TrainSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digested: list[str] = []
    digest = prepared.digest_file

    def watch(path: Path, *more: object) -> object:
        digested.append(path.name)
        return digest(path, *more)  # type: ignore[arg-type]

    for module in (prepared, corpus):
        monkeypatch.setattr(module, "digest_file", watch)
    settings = make_settings(steps=1, eval_every=0)
    train(settings)
    # Of files that are still empty: a preparation that goes on reads what is there.
    assert sorted(digested) == sorted({*digested}) and len(digested) == 4
    digested.clear()
    open_corpus(Path(settings.out) / "data", check=False)
    assert digested == []
    open_corpus(Path(settings.out) / "data")
    assert sorted(digested) == sorted({*digested}) and len(digested) == 4


def test_a_saved_model_takes_its_tokenizer_along(
    make_settings: Callable[..., TrainSettings], tmp_path: Path, text_folder: Path
) -> None:
    from longnet.training.data import train_tokenizer

    train_tokenizer([TEXT], 300).save(tmp_path)
    settings = make_settings(tokenizer=str(tmp_path), steps=1, eval_every=0)
    settings = settings.replace(model=settings.model.replace(vocab_size=300))
    train(settings)
    model = load_model(settings.out)
    save_model(model, tmp_path / "saved", tokenizer=settings.out)
    assert read_tokenizer(tmp_path / "saved").digest == read_tokenizer(tmp_path).digest
    with pytest.raises(ValueError, match="tokenizer='bytes' has 256 tokens, the model 300: expected the one"):
        save_model(model, tmp_path / "other", tokenizer="bytes")
    assert not (tmp_path / "other").exists()


def test_a_character_that_is_not_finished_is_shown(tmp_path: Path) -> None:
    from longnet.training.data import train_tokenizer

    tokenizer = train_tokenizer([TEXT], 257)
    (ids,) = tokenizer.encode(["a\u4e2d".encode()])
    read = tokenizer.reader(ids[:0])
    assert [read(token) for token in ids[:-1].tolist()] == [b"a", b"", b""]
    assert read(None) == "\ufffd".encode()
    read = tokenizer.reader(ids[:0])
    assert b"".join(read(token) for token in ids.tolist()) == "a\u4e2d".encode() and read(None) == b""


@pytest.mark.parametrize("megabytes", ["0", "-1", "nan"])
def test_megabytes_are_checked(megabytes: str, text_folder: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "longnet",
        "tokenizer",
        "train",
        "--data",
        str(text_folder),
        "--out",
        str(tmp_path / "t"),
    ]
    done = subprocess.run([*command, "--megabytes", megabytes], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "megabytes" in done.stderr and not (tmp_path / "t").exists()


def test_a_broken_config_of_a_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        read_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="is not there"):
        find_source(tmp_path / "none", "text", lambda line: None)


def _save(tokenizer: object, folder: Path) -> str:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))  # type: ignore[attr-defined]
    return str(folder)


def test_a_small_compressed_file_is_one_piece(text_folder: Path, tmp_path: Path) -> None:
    """Of a tokenizer that knows no place to cut at: a second, empty piece would count as a cut."""
    library = pytest.importorskip("tokenizers")
    words = library.Tokenizer(library.models.WordLevel({"[UNK]": 0, "line": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = library.pre_tokenizers.Whitespace()
    (text_folder / "packed.txt.gz").write_bytes(gzip.compress(TEXT))
    made = read_corpus(text_folder, tokenizer=_save(words, tmp_path / "words"), folder=tmp_path / "data")
    assert made.lost["uncertain_cuts"] == 0 and made.lost["unknown_tokens"] > 0


def test_a_tokenizer_that_leaves_text_out_is_refused(text_folder: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers")
    letters = {"a": 0, "b": 1, "c": 2}
    silent = library.Tokenizer(library.models.BPE(letters, []))
    with pytest.raises(ValueError, match="is a BPE that leaves out what its vocabulary lacks: expected one of bytes"):
        read_corpus(text_folder, tokenizer=_save(silent, tmp_path / "silent"), folder=tmp_path / "data")
    known = library.Tokenizer(library.models.BPE({**letters, "?": 3}, [], unk_token="?"))
    made = read_corpus(text_folder, tokenizer=_save(known, tmp_path / "known"), folder=tmp_path / "data")
    assert made.lost["unknown_tokens"] > 0


def test_rows_that_are_all_left_out_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(rows(20)))
    with pytest.raises(
        ValueError, match=r"0 documents with text.*Skipped 20 row\(s\) without a text in 'nope'.*jsonl:1 has"
    ):
        read_corpus(tmp_path / "a.jsonl", field="nope", skip_bad_rows=True)
