"""What is no text, shards and their documents, and folders of prepared data."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from longnet.training import TrainSettings, train
from longnet.training.data import Corpus, check_documents, read_corpus, read_tokenizer, train_tokenizer
from longnet.training.data import preparation as prepared
from longnet.training.progress import SilentReporter

DOCUMENTS = [f"Document {n} says {n * n}. ".encode() * 4 for n in range(40)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of 280 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(DOCUMENTS, 280).save(folder)
    return folder


def tokens_of(folder: Path) -> list[np.ndarray]:
    """The tokens of each document and the token that ends it, of the tokenizer in a folder."""
    tokenizer = read_tokenizer(folder)
    return [np.append(one, tokenizer.end).astype("<u2") for one in tokenizer.encode(DOCUMENTS)]


def text_of(corpus: Corpus) -> bytes:
    return corpus.train[:].tobytes() + corpus.held_out[:].tobytes()


def test_arrow_parquet_and_prepared_data_are_never_text(text_folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    before = read_corpus(text_folder)
    rows = datasets.Dataset.from_dict({"text": [f"row {n}" for n in range(30)]})
    rows.save_to_disk(text_folder / "saved")
    datasets.DatasetDict({"train": rows}).save_to_disk(text_folder / "splits")
    read_corpus(text_folder / "a" / "01.txt", folder=text_folder / "tokens")
    (text_folder / "b.feather").write_bytes(b"ARROW1\0\0 and more")
    (text_folder / "b.bin.gz").write_bytes(gzip.compress(b"tokens"))
    said: list[str] = []
    assert read_corpus(text_folder, said.append).fingerprint == before.fingerprint
    unread = "\n".join(line for line in said if line.startswith("Not read"))
    for name in ("data-00000-of-00001.arrow, dataset_info.json, state.json", "dataset_dict.json", "b.feather"):
        assert f"Not read: {name} in {text_folder}" in unread
    assert "splits/train, written by datasets" in unread and "tokens, written by longnet prepare" in unread
    assert "b.bin.gz is compressed shard" in unread
    for path in (text_folder / "b.feather", text_folder / "saved" / "data-00000-of-00001.arrow"):
        with pytest.raises(ValueError, match="is Arrow: expected the folder of the data set that datasets has saved"):
            read_corpus(path)
    (tmp_path / "alone").mkdir()
    (text_folder / "saved").rename(tmp_path / "alone" / "saved")
    with pytest.raises(ValueError, match=r"holds no text, but what other programs have saved in .*saved: expected"):
        read_corpus(tmp_path / "alone")
    rows.to_parquet(text_folder / "e.pq")
    for path in (text_folder / "e.pq", text_folder):
        corpus = read_corpus(path)
        assert b"PAR1" not in text_of(corpus) and b"row 17" in text_of(corpus)
    (text_folder / "e.pq.gz").write_bytes(gzip.compress((text_folder / "e.pq").read_bytes()))
    with pytest.raises(ValueError, match="is compressed Parquet: expected it decompressed"):
        read_corpus(text_folder / "e.pq.gz")


def test_other_files_of_a_saved_data_set_are_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": [f"row {n}" for n in range(90)]}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "README.md").write_text("of rows")
    said: list[str] = []
    assert b"of rows" not in text_of(read_corpus(tmp_path / "saved", said.append))
    assert f"Not read: README.md in {tmp_path / 'saved'}, as its saved data set is read" in said


def test_a_single_shard_is_tokens(made: Path, tmp_path: Path) -> None:
    documents = tokens_of(made)
    tokens = np.concatenate(documents)
    (tmp_path / "data").mkdir()
    tokens.tofile(tmp_path / "data" / "one.bin")
    for path in (tmp_path / "data", tmp_path / "data" / "one.bin"):
        corpus = read_corpus(path, tokenizer=str(made))
        assert np.array_equal(np.concatenate([corpus.train[:], corpus.held_out[:]]), tokens)
        assert corpus.held_out.size == tokens.size // 10
    with pytest.raises(ValueError, match="the tokenizer has 256: expected --tokenizer"):
        read_corpus(tmp_path / "data" / "one.bin")
    (tmp_path / "data" / "one.bin").write_bytes(bytes(20))
    with pytest.raises(ValueError, match="holds 10 tokens: expected at least 20"):
        read_corpus(tmp_path / "data")


def test_the_other_files_of_nanogpt_are_named_and_documents_end_at_their_token(made: Path, tmp_path: Path) -> None:
    documents = tokens_of(made)
    np.concatenate(documents[:30]).tofile(tmp_path / "train.bin")
    np.concatenate(documents[30:]).tofile(tmp_path / "val.bin")
    for name in ("meta.pkl", "prepare.py", "README.md"):
        (tmp_path / name).write_text("not read")
    said: list[str] = []
    corpus = read_corpus(tmp_path, said.append, tokenizer=str(made))
    assert f"Not read: README.md, meta.pkl, prepare.py in {tmp_path}, as its shards of tokens are read" in said
    assert np.array_equal(corpus.train[:], np.concatenate(documents[:30])) and corpus.train_documents == 30
    assert corpus.documents.tolist() == [0, *np.cumsum([one.size for one in documents[:29]]).tolist()]
    assert corpus.shard_ends == 30 and corpus.held_out_documents == 10
    check_documents(corpus)
    (tmp_path / "val.bin").unlink()
    with pytest.raises(ValueError, match="expected a folder of one kind, or shards to train on and some with 'val'"):
        read_corpus(tmp_path, tokenizer=str(made))


def test_documents_of_shards_may_end_where_a_batch_does(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longnet.training.data import sources

    documents = tokens_of(made)
    np.concatenate(documents).tofile(tmp_path / "one.bin")
    whole = read_corpus(tmp_path / "one.bin", tokenizer=str(made))
    monkeypatch.setattr(sources, "_PIECE", 2 * documents[0].size)
    monkeypatch.setattr(prepared, "_CHUNK", 1)
    again = read_corpus(tmp_path / "one.bin", tokenizer=str(made))
    assert again.fingerprint == whole.fingerprint and again.documents[1] == documents[0].size


def test_packing_needs_ends_of_documents(
    made: Path, tmp_path: Path, make_settings: Callable[..., TrainSettings]
) -> None:
    documents = tokens_of(made)
    np.concatenate([one[:-1] for one in documents]).tofile(tmp_path / "one.bin")
    settings = make_settings(data=str(tmp_path / "one.bin"), tokenizer=str(made), pack="documents")
    settings = settings.replace(model=settings.model.replace(vocab_size=280))
    with pytest.raises(ValueError, match=r"pack='documents' with .* '<\|endoftext\|>' \(0\), does not occur"):
        train(settings)
    assert not Path(settings.out).exists()
    (tmp_path / "one.txt").write_bytes(bytes(2000))
    said: list[str] = []
    reporter = SilentReporter()
    reporter.say = said.append  # type: ignore[method-assign]
    train(make_settings(data=str(tmp_path / "one.txt"), pack="documents", steps=1), reporter=reporter)
    assert "pack='documents' changes nothing: the training data are one document" in said
    (np.arange(500) % 256).astype("<u2").tofile(tmp_path / "bytes.bin")
    with pytest.raises(ValueError, match="whose tokenizer has no token that ends a document"):
        train(make_settings(data=str(tmp_path / "bytes.bin"), out=str(tmp_path / "other"), pack="documents"))


def test_a_truncated_shard_is_refused(made: Path, tmp_path: Path) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, 900
    for count, says in ((1000, r"holds 500 tokens, its header says 900"), (-9, "is shorter than its header")):
        content = header.tobytes() + bytes(max(0, count))
        (tmp_path / "one.bin").write_bytes(content[: len(content) + min(0, count)])
        with pytest.raises(ValueError, match=rf"one\.bin {says}: expected a whole shard"):
            read_corpus(tmp_path / "one.bin", tokenizer=str(made))


def test_options_for_rows_without_rows_are_refused(
    text_folder: Path, tmp_path: Path, make_settings: Callable[..., TrainSettings]
) -> None:
    (np.arange(500) % 256).astype("<u2").tofile(tmp_path / "one.bin")
    read_corpus(text_folder, folder=tmp_path / "prepared")
    for path, what in (
        (text_folder, "holds no rows"),
        (tmp_path / "one.bin", "holds tokens already"),
        (tmp_path / "prepared", "is prepared already"),
    ):
        with pytest.raises(ValueError, match=f"field='body' with data='.*', which {what}: expected no --field"):
            read_corpus(path, field="body")
        with pytest.raises(
            ValueError, match=f"skip_bad_rows=True with data='.*', which {what}: expected no --skip-bad"
        ):
            read_corpus(path, skip_bad_rows=True)
    with pytest.raises(ValueError, match="field='body' with data="):
        train(make_settings(data=str(tmp_path / "prepared"), field="body"))
    with pytest.raises(ValueError, match="field='': expected the name of the field"):
        read_corpus(text_folder, field="")
    with pytest.raises(ValueError, match="data='': expected a file or a folder"):
        read_corpus("")


def test_a_preparation_that_starts_over_says_why(made: Path, text_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    content = text_folder / "a" / "01.txt"

    def said_of(**options: str) -> list[str]:
        """What a preparation says that meets a half-prepared folder."""
        (folder / "prepared.json").rename(folder / "unfinished.json")
        said: list[str] = []
        read_corpus(text_folder, said.append, folder=folder, **options)
        return [line for line in said if line.startswith("Starting over")]

    read_corpus(text_folder, folder=folder)
    start = f"Starting over: what {folder} holds was prepared "
    assert said_of(tokenizer=str(made)) == [start + "with another tokenizer"]
    content.write_text(content.read_text() + "more")
    assert said_of() == [start + "before the data changed and with another tokenizer"]
    said: list[str] = []
    read_corpus(content, said.append, folder=folder)
    assert start + "from other data" in said


@pytest.mark.parametrize("is_there", [True, False])
def test_a_refused_preparation_leaves_nothing(is_there: bool, tmp_path: Path) -> None:
    folder = tmp_path / "more" / "data"
    if is_there:
        folder.mkdir(parents=True)
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(bytes(range(256)) * 99)[:-9])
    for path, field in (("rows.jsonl", "nope"), ("rows.jsonl", "text"), ("cut.txt.gz", "text")):
        with pytest.raises(ValueError, match=r"nope|has 2 documents|cannot be decompressed"):
            read_corpus(tmp_path / path, folder=folder, field=field)
        assert folder.exists() == is_there and not any(tmp_path.glob("more/data/*"))
    assert (tmp_path / "more").exists() == is_there


def test_a_folder_of_other_files_is_no_place_for_tokens(text_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("notes")
    with pytest.raises(ValueError, match=r"folder='.*other' holds notes.txt: expected a new or empty folder"):
        read_corpus(text_folder, folder=tmp_path / "other")
