"""Tokenizers, rows, prepared folders, packed documents."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from longnet.models import LongNetLM
from longnet.training import TrainSettings, load_model, train, write_report
from longnet.training.data import (
    BYTES,
    Tokenizer,
    cut_windows,
    find_source,
    is_prepared,
    open_corpus,
    pack_windows,
    read_corpus,
    read_tokenizer,
    sources,
    train_tokenizer,
)
from longnet.training.data import (
    preparation as prepared,
)
from longnet.training.folder import RunFolder
from longnet.training.resume import read_settings

TEXTS = [f"Le caf\u00e9 num\u00e9ro {n} \U0001f600\n\n    is {n * n}.\n".encode() * 5 for n in range(60)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of 300 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 300).save(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(made: Path) -> Tokenizer:
    return read_tokenizer(made)


def write_rows(path: Path, texts: list[bytes]) -> None:
    path.write_text("".join(json.dumps({"id": n, "text": text.decode()}) + "\n" for n, text in enumerate(texts)))


def test_any_bytes_come_back_and_the_file_gives_the_same_tokenizer(tokenizer: Tokenizer, made: Path) -> None:
    assert (tokenizer.vocab_size, tokenizer.end, tokenizer.dtype) == (300, 0, "uint16")
    again = read_tokenizer(made / "tokenizer.json")
    for text, tokens in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert tokenizer.decode(tokens) == text and len(tokens) < len(text)
        read = tokenizer.reader(tokens[:0])
        assert b"".join(read(token) for token in tokens.tolist()) == text
        assert np.array_equal(next(again.encode([text])), tokens)
    (broken,) = tokenizer.encode([b"caf\xe9"])
    assert tokenizer.decode(broken) == "caf\ufffd".encode()
    assert again.digest == tokenizer.digest != BYTES.digest


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"tokenizer\.json is not there, expected 'bytes', a tokenizer\.json, or a folder"
    ):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is no tokenizer of the tokenizers library"):
        read_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="vocab=100: expected at least 257"):
        train_tokenizer(TEXTS, 100)
    with pytest.raises(ValueError, match=r"vocab=9000: the text gives \d+ tokens"):
        train_tokenizer(TEXTS, 9000)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved", "splits"])
def test_rows_are_documents(kind: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [text.decode() for text in TEXTS], "id": list(range(60))})
    path = tmp_path / "rows"
    if kind == "jsonl":
        path = tmp_path / "rows.jsonl"
        write_rows(path, TEXTS)
    elif kind == "parquet":
        path.mkdir()
        rows.to_parquet(path / "a.parquet")
        (path / "b.txt").write_bytes(b"a whole file")
    elif kind == "saved":
        rows.save_to_disk(path)
    else:
        held_out, kept = rows.select(range(10)), rows.select(range(10, 60))
        datasets.DatasetDict({"train": kept, "validation": held_out}).save_to_disk(path)
    corpus = read_corpus(path)
    files = kind == "parquet"
    assert corpus.train_documents + corpus.held_out_documents == 60 + files
    both = corpus.train[:].tobytes() + corpus.held_out[:].tobytes()
    assert all(text in both for text in TEXTS) and len(both) == sum(map(len, TEXTS)) + 12 * files
    if kind == "splits":
        assert corpus.held_out[:].tobytes() == b"".join(TEXTS[:10])
    else:
        assert 0 < corpus.held_out_documents < 20
    with pytest.raises(
        ValueError,
        match=r"field='body': .*(jsonl:1|row 1|parquet).* has .*'text' \(str.*\).*, expected a text of this name",
    ):
        read_corpus(path, field="body")


def test_shards_of_tokens(tokenizer: Tokenizer, made: Path, tmp_path: Path) -> None:
    (tokens,) = tokenizer.encode([b"".join(TEXTS)])
    (tmp_path / "data").mkdir()
    header = np.zeros(256, dtype="<i4")
    header[0] = 20240520
    (tmp_path / "data" / "train_0.bin").write_bytes(header.tobytes() + tokens[:-100].astype("<u2").tobytes())
    tokens[-100:].astype("<u2").tofile(tmp_path / "data" / "val.bin")
    corpus = read_corpus(tmp_path / "data", tokenizer=str(made))
    assert np.array_equal(corpus.train[:], tokens[:-100]) and np.array_equal(corpus.held_out[:], tokens[-100:])
    assert corpus.held_out_bytes == len(tokenizer.decode(tokens[-100:]))
    with pytest.raises(
        ValueError, match=r"holds the token \d+, the tokenizer has 256: expected --tokenizer to be the one"
    ):
        read_corpus(tmp_path / "data")
    (tmp_path / "data" / "val.bin").rename(tmp_path / "data" / "train_1.bin")
    with pytest.raises(ValueError, match="expected shards to train on and some with 'val' in the name"):
        read_corpus(tmp_path / "data", tokenizer=str(made))


def test_documents_end_with_their_token_and_begin_where_they_say(
    made: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows.jsonl", TEXTS)
    corpus = read_corpus(tmp_path / "rows.jsonl", tokenizer=str(made))
    train = corpus.train[:]
    assert (train == tokenizer.end).sum() == corpus.train_documents == len(corpus.documents)
    assert corpus.documents[0] == 0 and np.array_equal(corpus.documents[1:], np.flatnonzero(train == 0)[:-1] + 1)
    assert corpus.tokens_per_byte == corpus.held_out.size / corpus.held_out_bytes < 1


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_an_interrupted_preparation_goes_on(
    stop: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = tmp_path / "rows.jsonl", tmp_path / "data"
    write_rows(path, TEXTS)
    monkeypatch.setattr(prepared, "_CHUNK", 700)
    whole = read_corpus(path, tokenizer=str(made))
    write, count = prepared.Preparation._write, []

    def killed(self: object, batch: object, encoded: object, cut: object, files: object) -> None:
        count.append(1)
        if len(count) > stop:
            files["train.tokens"].write(b"what a kill leaves behind")  # type: ignore[index]
            raise KeyboardInterrupt
        write(self, batch, encoded, cut, files)  # type: ignore[arg-type]

    monkeypatch.setattr(prepared.Preparation, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        read_corpus(path, tokenizer=str(made), folder=folder)
    monkeypatch.setattr(prepared.Preparation, "_write", write)
    assert not is_prepared(folder)
    said: list[str] = []
    again = read_corpus(path, said.append, tokenizer=str(made), folder=folder)
    assert again.fingerprint == whole.fingerprint and any(line.startswith("Going on after") for line in said)
    assert not (folder / "unfinished.json").exists()
    # Another text into the same folder is prepared from its beginning.
    write_rows(path, TEXTS[::-1])
    assert read_corpus(path, tokenizer=str(made), folder=folder).fingerprint != whole.fingerprint


def test_damaged_data_are_refused(made: Path, text_folder: Path, tmp_path: Path) -> None:
    corpus = read_corpus(text_folder, tokenizer=str(made), folder=tmp_path / "data")
    assert (
        open_corpus(tmp_path / "data").fingerprint == read_corpus(tmp_path / "data").fingerprint == corpus.fingerprint
    )
    file = tmp_path / "data" / "held_out.tokens"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"!")
    with pytest.raises(ValueError, match=r"held_out\.tokens is damaged: its content does not match"):
        open_corpus(tmp_path / "data")
    file.write_bytes(content)
    (tmp_path / "data" / "tokenizer.json").write_text((made / "tokenizer.json").read_text() + " ")
    with pytest.raises(ValueError, match="is not the one that made its tokens"):
        open_corpus(tmp_path / "data")
    with pytest.raises(ValueError, match="holds no prepared data"):
        open_corpus(tmp_path)


def test_windows_become_a_row_of_documents() -> None:
    stream, documents, starts = np.arange(60, dtype=np.uint8), np.array([0, 5, 9, 30, 35]), np.array([0, 5, 20, 25])
    tokens, targets, bounds = pack_windows(*cut_windows(stream, 10, starts), documents, starts)
    assert bounds == [0, 5, 9, 10, 14, 20, 30, 35, 40] and tokens.shape == targets.shape == (1, 40)
    assert tokens[0].tolist() == [*range(10), *range(5, 15), *range(20, 30), *range(25, 35)]
    # A document begins after each of these; the window from 20 ends where one begins, that from 25 too.
    last = [place for place, target in enumerate(targets[0].tolist()) if target == -100]
    assert last == [4, 8, 13, 29, 34, 39]
    assert all(targets[0, place] == tokens[0, place] + 1 for place in range(40) if place not in last)


@pytest.mark.parametrize("pack", [None, "documents"])
@pytest.mark.parametrize("tokens", [True, False])
def test_a_run_on_tokens(
    tokens: bool, pack: str | None, made: Path, make_settings: Callable[..., TrainSettings], tmp_path: Path
) -> None:
    settings = make_settings(tokenizer=str(made) if tokens else "bytes", pack=pack, accumulate=2)
    model = settings.model.replace(vocab_size=300 if tokens else 256)
    settings = settings.replace(model=model)
    losses = losses_of(settings.replace(out=str(tmp_path / "whole")))
    stopped = []
    train(settings, should_stop=lambda: stopped.append(1) or len(stopped) > 7)
    assert losses_of(settings, resume=True) == losses and len(losses) == 12
    evaluation = write_report(settings.out)
    held_out = open_corpus(Path(settings.out) / "data").held_out_bytes
    assert evaluation.unit == ("tokens" if tokens else "bytes") and 0.5 * held_out < evaluation.scored_bytes <= held_out
    assert 1 < evaluation.bits_per_byte.mean < 9 and evaluation.baselines.unigram < 9
    assert load_model(settings.out).config.vocab_size == model.vocab_size


def losses_of(settings: TrainSettings, resume: bool = False) -> list[float]:
    train(settings, resume=resume)
    lines = map(json.loads, (Path(settings.out) / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_packed_documents_do_not_see_each_other(make_settings: Callable[..., TrainSettings]) -> None:
    torch.manual_seed(0)
    model = LongNetLM(make_settings().model).eval()
    tokens, bounds = torch.randint(256, (1, 40)), [0, 7, 25, 40]
    packed = model.loss(tokens[:, :-1], tokens[:, 1:], reduction="none", cu_seqlens=[0, 7, 25, 39])
    for first, last in itertools.pairwise(bounds):
        alone = model.loss(tokens[:, first : last - 1], tokens[:, first + 1 : last], reduction="none")
        torch.testing.assert_close(packed[:, first : last - 1], alone)


def test_the_vocabulary_has_to_be_the_tokenizers(made: Path, make_settings: Callable[..., TrainSettings]) -> None:
    settings = make_settings(tokenizer=str(made))
    message = r"vocab_size=256 in the model: expected LongNetConfig\(\.\.\., vocab_size=300\), as the tokenizer has 300 tokens"
    with pytest.raises(ValueError, match=message):
        train(settings)
    assert not Path(settings.out).exists()
    with pytest.raises(ValueError, match="pack='documents' with cp=2: expected cp=1"):
        make_settings(pack="documents", cp=2)


@pytest.mark.slow
def test_commands_from_text_to_text(text_folder: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "longnet", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("tokenizer", "train", "--data", str(text_folder), "--vocab", "280", "--out", "tok")
    run("prepare", "--data", str(text_folder), "--tokenizer", "tok", "--out", "prepared")
    small = ["--preset", "nano", "--context", "64", "--steps", "4", "--batch", "2", "--device", "cpu"]
    run("train", "--data", "prepared", *small, "--out", "first")
    run("train", "--data", str(text_folder), "--tokenizer", "tok", "--pack", "documents", *small, "--out", "second")
    assert not (tmp_path / "first" / "data").exists() and is_prepared(tmp_path / "second" / "data")
    text = run("generate", "second", "--prompt", "line", "--tokens", "9", "--temperature", "0")
    assert text.startswith("line")
    end = text.strip()[5:7]
    cut = run("generate", "second", "--prompt", "line", "--tokens", "9", "--temperature", "0", "--stop", end)
    assert cut.strip() == text[: text.index(end, 4) + len(end)].strip()
    transformers = pytest.importorskip("transformers")
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "second")("line 3")["input_ids"]
    assert ids == next(read_tokenizer(tmp_path / "tok").encode([b"line 3"])).tolist()


@pytest.mark.slow
def test_from_text_to_a_longer_context_by_the_example(text_folder: Path, tmp_path: Path) -> None:
    """Trained, killed, resumed, exported, read by transformers, trained on."""
    pytest.importorskip("transformers")
    script = Path(__file__).parents[2] / "examples" / "train_bpe.py"
    small = [
        "--vocab",
        "300",
        "--preset",
        "nano",
        "--context",
        "32",
        "--steps",
        "20",
        "--batch",
        "2",
        "--device",
        "cpu",
    ]
    command = [sys.executable, str(script), "--data", str(text_folder), "--out", str(tmp_path / "out"), *small]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "killed after step" in done.stdout and "after training on at a context of 128" in done.stdout
    lines = done.stdout.splitlines()
    generated = [line for line in lines if line.startswith("The ")]
    assert len(generated) == 2 and generated[0] == generated[1]
    run, longer = (read_settings(RunFolder(tmp_path / "out" / name)) for name in ("run", "longer"))
    assert (run.context, longer.context, longer.model.vocab_size) == (32, 128, 300)
    for name in ("run", "longer"):
        assert json.loads((tmp_path / "out" / name / "evaluation.json").read_text())["unit"] == "tokens"


def test_text_of_long_lines_loses_no_character(made: Path, tmp_path: Path) -> None:
    line = "\u4e2d\u6587\u00e9" * 30_000
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(line[number:])
    for path in (tmp_path, tmp_path / "0.txt"):
        corpus = read_corpus(path, tokenizer=str(made))
        for part in (corpus.train, corpus.held_out):
            assert b"\xef\xbf\xbd" not in corpus.tokenizer.decode(part[:])
    assert [sources.whole_character("a\u4e2d".encode(), place) for place in range(5)] == [0, 1, 1, 1, 4]
    assert sources.whole_character(bytes([0x80] * 9), 5) == 5


def test_folders_that_are_not_what_they_seem_are_refused(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "train.bin").write_bytes(bytes(40))
    (folder / "readme.md").write_text("of shards")
    with pytest.raises(
        ValueError, match=r"holds shards of tokens, such as train\.bin, and other files, such as readme\.md"
    ):
        read_corpus(folder, tokenizer=str(made))
    write_rows(tmp_path / "few.jsonl", TEXTS[:1])
    with pytest.raises(ValueError, match="has 1 documents with text, none of them"):
        read_corpus(tmp_path / "few.jsonl")
    write_rows(tmp_path / "rows.jsonl", TEXTS)
    read_corpus(tmp_path / "rows.jsonl", folder=tmp_path / "prepared")
    with pytest.raises(ValueError, match="is not the one that data="):
        read_corpus(tmp_path / "prepared", tokenizer=str(made))
    with pytest.raises(ValueError, match="is prepared already: expected text"):
        find_source(tmp_path / "prepared", "text", lambda line: None)


def test_an_end_that_is_no_token_and_ids_with_gaps(made: Path, tmp_path: Path) -> None:
    text = (made / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<nope>"}')
    with pytest.raises(ValueError, match="eos_token='<nope>' is none of its tokens"):
        read_tokenizer(tmp_path)
    tokenizers = pytest.importorskip("tokenizers")
    gaps = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "c": 900}, unk_token="a"))
    (tmp_path / "own").mkdir()
    gaps.save(str(tmp_path / "own" / "tokenizer.json"))
    found = read_tokenizer(tmp_path / "own")
    assert (found.vocab_size, found.dtype) == (901, "uint16")


def test_prepared_data_may_move_and_lost_data_come_again(
    made: Path, make_settings: Callable[..., TrainSettings], text_folder: Path, tmp_path: Path
) -> None:
    read_corpus(text_folder, folder=tmp_path / "prepared")
    settings = make_settings(data=str(tmp_path / "prepared"), steps=2, eval_every=0, schedule="constant")
    train(settings)
    (tmp_path / "prepared").rename(tmp_path / "moved")
    assert train(settings.replace(data=str(tmp_path / "moved"), steps=3), resume=True).step == 3
    own = make_settings(out=str(tmp_path / "own"), steps=2, eval_every=0, schedule="constant")
    train(own)
    shutil.rmtree(tmp_path / "own" / "data")
    file = text_folder / "a" / "01.txt"
    content = file.read_text()
    file.write_text(content + "more")
    with pytest.raises(ValueError, match=r"data is gone, and data .* is not what the run was started on"):
        train(own.replace(steps=3), resume=True)
    file.write_text(content)
    assert train(own.replace(steps=3), resume=True).step == 3
