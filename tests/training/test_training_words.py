"""The table of words gives the tokens that the tokenizers library gives for whole documents."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longnet.training.data import Tokenizer, read_corpus, read_tokenizer, sources, words
from longnet.training.data import preparation as prepared
from longnet.training.data import tokenizer as tokenizers_of

library = pytest.importorskip("tokenizers")
SOURCE = Path(words.__file__).read_text(encoding="utf-8")
ALPHABET = "aZz09 '  \n\n\t.,(){}/_-<|>\u00e9e\u0301\u3000\u00a0\u4e2d\u6587\u3002\U0001f600\x00\x0b\r\ufffd"


def random_texts(count: int) -> list[str]:
    draw = random.Random(0)
    texts = ["".join(draw.choices(ALPHABET, k=draw.randrange(120))) for _ in range(count)]
    words = [
        *[
            "it's",
            "don't",
            "<|endoftext|>",
            "[CLS]",
            "foo.bar",
            "1234567",
            "été",
            "(x)",
            "\n\n",
            "\n",
            "",
            "",
            "\r\n",
            "//",
            "\n/",
            "'s",
        ],
        "\n",
        " ",
        "  ",
    ]
    texts += [" ".join(draw.choices(words, k=40)) for _ in range(count)]
    return [*texts, SOURCE, "", "x" * 3000, "\u4e2d\u6587\u3002\n" * 200]


def make(kind: str) -> Any:
    """A tokenizer of the library that splits as a known family does, with few tokens of its own."""
    pre, split = library.pre_tokenizers, library.Regex
    if kind == "bert":
        made = library.Tokenizer(library.models.WordPiece(unk_token="[UNK]"))
        made.normalizer, made.pre_tokenizer = library.normalizers.BertNormalizer(), pre.BertPreTokenizer()
        trainer = library.trainers.WordPieceTrainer(
            vocab_size=300, special_tokens=["[UNK]", "[CLS]"], show_progress=False
        )
    else:
        made = library.Tokenizer(library.models.BPE())
        step = pre.ByteLevel(add_prefix_space=kind == "prefix", use_regex=kind not in ("llama", "qwen"))
        if kind in ("llama", "qwen"):
            step = pre.Sequence([pre.Split(split(words._SPLITS[kind == "qwen"]), "isolated"), step])
        if kind == "qwen":
            made.normalizer = library.normalizers.NFC()
        made.pre_tokenizer = step
        trainer = library.trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre.ByteLevel.alphabet(),
            show_progress=False,
        )
    made.train_from_iterator([SOURCE, *random_texts(50)], trainer)
    return made


def read(made: Any, folder: Path) -> Tokenizer:
    made.save(str(folder / "tokenizer.json"))
    return read_tokenizer(folder)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen", "bert", "prefix"])
def test_ids_are_those_of_whole_documents(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(kind)
    tokenizer, texts = read(made, tmp_path), random_texts(400)
    table = tokenizer._table  # type: ignore[attr-defined]
    assert (table is None) == (kind == "prefix")
    assert table is None or [join[0] for join in table._joins] == ([] if kind == "bert" else ["\n", " a"])
    expected = [made.encode(text, add_special_tokens=False).ids for text in texts]
    for together in (1 << 20, 300, 20):
        monkeypatch.setattr(tokenizers_of, "_TOGETHER", together)
        found = list(tokenizer.encode([text.encode() for text in texts]))
        assert [one.tolist() for one in found] == expected
        assert {one.dtype for one in found} == {np.dtype(tokenizer.dtype)}
        monkeypatch.setattr(words, "_MOST_TOKENS", 50)
        monkeypatch.setattr(words, "_LONG_WORD", 20)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen", "bert"])
def test_text_may_be_cut_at_every_place(kind: str, tmp_path: Path) -> None:
    made = make(kind)
    tokenizer = read(made, tmp_path)
    cuts = 0
    for text in random_texts(150):
        whole = made.encode(text, add_special_tokens=False).ids
        while (place := tokenizer.last_place(text.encode())) > 0:
            text, rest = (one.decode() for one in (text.encode()[:place], text.encode()[place:]))
            ids = made.encode(rest, add_special_tokens=False).ids
            assert whole[len(whole) - len(ids) :] == ids
            whole = whole[: len(whole) - len(ids)]
            assert made.encode(text, add_special_tokens=False).ids == whole
            cuts += 1
            if cuts % 60 == 0:
                break
    assert cuts > 300
    assert tokenizer.last_place(b"\xff\xfea b\xff") == 3


@pytest.mark.parametrize(
    "change",
    [
        {"dropout": 0.1},
        {"pattern": "x"},
        {"normalizer": "NFKC"},
        {"added": {"lstrip": True}},
        {"added": {"content": "a b"}},
        {"added": {"normalized": True}},
    ],
)
def test_another_way_to_split_is_not_known(change: dict[str, Any]) -> None:
    spec = json.loads(make("qwen").to_str())
    assert words.is_known(spec)
    if "dropout" in change:
        spec["model"] |= change
    elif "pattern" in change:
        spec["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "x"}
    elif "normalizer" in change:
        spec["normalizer"] = {"type": change["normalizer"]}
    else:
        spec["added_tokens"][0] |= change["added"]
    assert not words.is_known(spec)


@pytest.mark.parametrize("kind", ["gpt2", "prefix"])
def test_a_document_in_pieces_has_its_own_tokens(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 5,000 bytes; of a tokenizer without places to cut the cuts are counted and said."""
    made = make(kind)
    read(made, tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    for number in range(12):
        (data / f"{number}.txt").write_text(SOURCE[number:] * 2)
    monkeypatch.setattr(sources, "_PIECE", 5000)
    monkeypatch.setattr(prepared, "_CHUNK", 7000)
    said: list[str] = []
    corpus = read_corpus(data, said.append, tokenizer=str(tmp_path))
    cuts = [line for line in said if "tokens there may be others than uncut" in line]
    if kind == "prefix":
        assert corpus.describe()["uncertain_cuts"] > 12 and len(cuts) == 1
        return
    assert corpus.lost["uncertain_cuts"] == 0 and not cuts
    assert corpus.tokenizer.end is not None
    found = np.concatenate([corpus.train[:], corpus.held_out[:]])
    documents = np.split(found, np.flatnonzero(found == corpus.tokenizer.end) + 1)[:-1]
    expected = sorted(made.encode(SOURCE[number:] * 2).ids for number in range(12))
    assert sorted(one[:-1].tolist() for one in documents) == expected
