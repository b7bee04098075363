"""``LongNetByteTokenizer``: bytes there and back, special tokens, padding, folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from longnet_models import make
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from longnet.hf import LongNetByteTokenizer, LongNetConfig

TEXTS = some.text(some.characters(exclude_categories=["Cs"]))


@given(TEXTS.filter(lambda text: not any(special in text for special in ("<pad>", "<bos>", "<eos>"))))
def test_ids_are_utf_8_bytes(text: str) -> None:
    tokenizer = LongNetByteTokenizer()
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


@given(some.binary())
def test_any_bytes_survive(data: bytes) -> None:
    tokenizer = LongNetByteTokenizer(errors="surrogateescape")
    text = tokenizer.decode(list(data))
    assert tokenizer(text)["input_ids"] == list(data)
    assert LongNetByteTokenizer().decode(list(data)) == data.decode("utf-8", "replace")


def test_special_tokens_follow_the_bytes() -> None:
    tokenizer = LongNetByteTokenizer()
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257, 258)
    assert len(tokenizer) == 259 == LongNetConfig().vocab_size
    assert (LongNetConfig().pad_token_id, LongNetConfig().bos_token_id, LongNetConfig().eos_token_id) == (256, 257, 258)
    assert tokenizer("<bos>a é<eos>")["input_ids"] == [257, *"a é".encode(), 258]
    assert tokenizer.decode([257, 97, 258]) == "<bos>a<eos>"
    assert tokenizer.decode([257, 97, 258, 256], skip_special_tokens=True) == "a"
    assert sorted(tokenizer.get_vocab().values()) == list(range(259))
    with pytest.raises(ValueError, match="id 300: expected 0 to 258"):
        tokenizer.decode([300])


def test_spaces_and_line_ends_stay() -> None:
    tokenizer, text = LongNetByteTokenizer(), "  a \n\t<eos> .  , \r\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_padding_is_on_the_left_unless_asked() -> None:
    tokenizer = LongNetByteTokenizer()
    batch = tokenizer(["a", "bcd"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[256, 256, 97], [98, 99, 100]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    right = tokenizer(["a", "bcd"], padding="max_length", max_length=4, padding_side="right", truncation=True)
    assert right["input_ids"] == [[97, 256, 256, 256], [98, 99, 100, 256]]


@pytest.mark.parametrize("options", [{}, {"mask_token": "<mask>", "errors": "surrogateescape"}, {"eos_token": "</s>"}])
def test_folders(options: dict[str, str], tmp_path: Path) -> None:
    tokenizer = LongNetByteTokenizer(**options)
    tokenizer.save_pretrained(tmp_path)
    for again in (LongNetByteTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert isinstance(again, LongNetByteTokenizer)
        assert again.get_vocab() == tokenizer.get_vocab() and again.special_tokens_map == tokenizer.special_tokens_map
        assert again.errors == tokenizer.errors and again.padding_side == "left"


def test_a_model_that_knows_bytes_alone() -> None:
    alone = LongNetByteTokenizer(pad_token=None, bos_token=None, eos_token=None)
    assert len(alone) == 256 and alone("é")["input_ids"] == [195, 169]
    zero = LongNetByteTokenizer(pad_token="\0", bos_token=None, eos_token=None)
    assert len(zero) == 256 and zero.pad_token_id == 0
    batch = zero(["a", "bc"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[0, 97], [98, 99]]
    assert make(vocab_size=256)(**batch).logits.isfinite().all()


def test_masked_batches() -> None:
    tokenizer = LongNetByteTokenizer(mask_token="<mask>")
    torch.manual_seed(0)
    batch = DataCollatorForLanguageModeling(tokenizer)([tokenizer("some text to mask"), tokenizer("and more")])
    assert tokenizer.mask_token_id == 259 and (batch["input_ids"] == 259).any()


def test_unknown_errors_are_refused() -> None:
    with pytest.raises(ValueError, match="errors='eror': expected one of"):
        LongNetByteTokenizer(errors="eror")
