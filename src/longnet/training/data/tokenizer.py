"""Tokenizers: bytes, or those of the ``tokenizers`` library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from longnet.training.data.words import WordTable, cut_text, is_known, last_place
from longnet.training.files import read_json, write_text

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>")
"""Tokens that end a document where a tokenizer does not say which of its own does."""


_TOGETHER = 1 << 20
"""Bytes of text that are encoded at once."""
_TAIL = 1 << 16
"""Bytes at the end of a text in which a place to cut it is looked for."""


class Tokenizer(Protocol):
    """What turns text into tokens and back.

    Attributes:
        vocab_size: tokens are below it.
        end: the token after each document; None for none.
        unknown: the token that stands for text without one; None for none.
        digest: SHA-256 (hex) of what the tokenizer does.
    """

    vocab_size: int
    end: int | None
    unknown: int | None
    digest: str

    @property
    def is_bytes(self) -> bool:
        """Whether tokens are the bytes themselves."""

    @property
    def dtype(self) -> str:
        """The smallest unsigned type that holds every token."""
        return "uint8" if self.vocab_size <= 1 << 8 else "uint16" if self.vocab_size <= 1 << 16 else "uint32"

    def encode(self, texts: Sequence[bytes]) -> Iterator[np.ndarray]:
        """The tokens of each text, (tokens,) of :attr:`dtype`. Bytes that are not UTF-8 become the replacement character."""

    def last_place(self, text: bytes) -> int:
        """The last place near the end of a text at which a cut changes no token; 0 for none."""

    def decode(self, tokens: np.ndarray) -> bytes:
        """The text of tokens."""

    def reader(self, before: np.ndarray) -> Callable[[int | None], bytes]:
        """A function that takes the tokens after ``before`` one by one, and gives what is known of their text by then.

        For None, at the end, it gives what it held back: a character that is not finished.
        """

    def save(self, folder: Path) -> None:
        """Write it into a folder, from which :func:`read_tokenizer` reads it."""


class _Bytes(Tokenizer):
    vocab_size, end, unknown = 256, None, None
    digest = hashlib.sha256(b"bytes").hexdigest()
    is_bytes = True

    def encode(self, texts: Sequence[bytes]) -> Iterator[np.ndarray]:
        return (np.frombuffer(text, dtype=np.uint8) for text in texts)

    def last_place(self, text: bytes) -> int:
        return len(text)

    def decode(self, tokens: np.ndarray) -> bytes:
        return np.asarray(tokens).astype(np.uint8).tobytes()

    def reader(self, before: np.ndarray) -> Callable[[int | None], bytes]:
        return lambda token: b"" if token is None else bytes([token])

    def save(self, folder: Path) -> None:
        pass


BYTES: Tokenizer = _Bytes()


class _Tokens(Tokenizer):
    """Of a ``tokenizer.json``."""

    is_bytes = False

    def __init__(self, text: str, end: str | None) -> None:
        import tokenizers

        self._made_of = text, end
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        # As trained: the file may ask for the opposite.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        if end is not None and self._tokenizer.token_to_id(end) is None:
            raise ValueError(f"eos_token={end!r} is none of its tokens")
        names = END_OF_DOCUMENT if end is None else (end,)
        self.end = next((token for name in names if (token := self._tokenizer.token_to_id(name)) is not None), None)
        self.digest = hashlib.sha256(f"{text}\0{self.end}".encode()).hexdigest()
        spec = json.loads(self._tokenizer.to_str())
        unknown = spec["model"].get("unk_token")
        self.unknown = spec["model"].get("unk_id") if unknown is None else self._tokenizer.token_to_id(unknown)
        self._table = WordTable(self._ids, self.dtype) if is_known(spec) else None
        self._special = [one["content"] for one in spec["added_tokens"]]
        self._signs = {content[:2] for content in self._special}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._made_of

    def encode(self, texts: Sequence[bytes]) -> Iterator[np.ndarray]:
        strings: list[str] = []
        size = 0
        for text in texts:
            strings.append(text.decode("utf-8", "replace"))
            size += len(text)
            if size >= _TOGETHER:
                yield from self._encode(strings)
                strings, size = [], 0
        if strings:
            yield from self._encode(strings)

    def _encode(self, strings: list[str]) -> Iterator[np.ndarray]:
        if self._table is None:
            yield from (np.array(ids, dtype=self.dtype) for ids in self._ids(strings))
        elif len(strings) == 1:
            yield np.concatenate([self._encode_part(part) for part in cut_text(strings[0], _TOGETHER)])
        elif self._has_special("\0".join(strings)):
            yield from map(self._encode_part, strings)
        else:
            yield from self._table.tokens(strings)

    def _encode_part(self, text: str) -> np.ndarray:
        assert self._table is not None
        (tokens,) = [self._ids([text])[0]] if self._has_special(text) else self._table.tokens([text])
        return np.asarray(tokens, dtype=self.dtype)

    def _has_special(self, text: str) -> bool:
        """Whether a token of its own stands in a text literally: the library finds these before it splits text into words."""
        return any(sign in text for sign in self._signs) and any(one in text for one in self._special)

    def _ids(self, strings: list[str]) -> list[list[int]]:
        return [one.ids for one in self._tokenizer.encode_batch_fast(strings, add_special_tokens=False)]

    def last_place(self, text: bytes) -> int:
        string = text[-_TAIL:].decode("utf-8", "surrogateescape")
        place = 0 if self._table is None else last_place(string)
        return len(text) - len(string[place:].encode("utf-8", "surrogateescape")) if place else 0

    def decode(self, tokens: np.ndarray) -> bytes:
        text: str = self._tokenizer.decode(np.asarray(tokens).tolist())
        return text.encode()

    def reader(self, before: np.ndarray) -> Callable[[int | None], bytes]:
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        for token in before.tolist():
            stream.step(self._tokenizer, token)
        pending: list[int] = []

        def read(token: int | None) -> bytes:
            if token is None:
                return self._tokenizer.decode(pending, skip_special_tokens=False).encode() if pending else b""
            pending.append(token)
            text = stream.step(self._tokenizer, token)
            if text:
                pending.clear()
            return (text or "").encode()

        return read

    def save(self, folder: Path) -> None:
        write_text(folder / TOKENIZER_FILES[0], self._made_of[0])
        if self.end is not None:
            config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._tokenizer.id_to_token(self.end)}
            write_text(folder / TOKENIZER_FILES[1], json.dumps(config))


def read_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer of a name: ``"bytes"``, a ``tokenizer.json``, or a folder that holds one (of Hugging Face, or a run).

    The token after each document is the ``eos_token`` of ``tokenizer_config.json`` beside the file, else the first of
    :data:`END_OF_DOCUMENT` that it knows.

    Raises:
        ValueError: no such file, or one that the library does not read. ModuleNotFoundError: ``tokenizers`` is missing.
    """
    if str(name) == "bytes":
        return BYTES
    path = Path(name)
    file = path / TOKENIZER_FILES[0] if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"tokenizer={str(name)!r}: {file} is not there, expected 'bytes', a tokenizer.json, or a folder that holds one "
            "(transformers writes it with AutoTokenizer.from_pretrained(...).save_pretrained(folder))"
        )
    end, beside = None, file.with_name(TOKENIZER_FILES[1])
    if beside.is_file():
        eos = read_json(beside).get("eos_token")
        end = eos.get("content") if isinstance(eos, dict) else eos
    try:
        made = _Tokens(file.read_text(encoding="utf-8"), end)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # What the library raises has no class of its own.
        raise ValueError(
            f"tokenizer={str(name)!r}: {file} is no tokenizer of the tokenizers library: {error}"
        ) from None
    if drops_text(read_json(file)):
        raise ValueError(
            f"tokenizer={str(name)!r}: {file} is a BPE that leaves out what its vocabulary lacks: expected one of bytes "
            "(ByteLevel), with byte_fallback, or with an unknown token"
        )
    return made


def drops_text(spec: dict[str, Any]) -> bool:
    """Whether the tokenizer of a ``tokenizer.json`` leaves out characters that it has no token for."""
    model, steps = spec["model"], [spec.get(name) or {} for name in ("normalizer", "pre_tokenizer")]
    parts = [part for step in steps for part in (step, *step.get("pretokenizers", ()), *step.get("normalizers", ()))]
    if model.get("type") != "BPE" or model.get("unk_token") is not None or model.get("byte_fallback"):
        return False
    return not any(part.get("type") == "ByteLevel" for part in parts)


def train_tokenizer(texts: Iterable[bytes], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (GPT-2's, arXiv 1508.07909 on bytes) of texts, by the ``tokenizers`` library; no text is unknown to it.

    Args:
        texts: read once, piece by piece.
        vocab_size: at least 257: the bytes and the token that ends a document.

    Raises:
        ValueError: a vocabulary that is too small, or too few texts for one so large.
    """
    import tokenizers as library

    if vocab_size < 257:
        raise ValueError(f"vocab={vocab_size}: expected at least 257, the bytes and the end of a document")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT[0]],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.decode("utf-8", "replace") for text in texts), trainer)
    if (found := tokenizer.get_vocab_size()) < vocab_size:
        raise ValueError(
            f"vocab={vocab_size}: the text gives {found} tokens, expected more text or a smaller vocabulary"
        )
    return _Tokens(tokenizer.to_str(pretty=True), END_OF_DOCUMENT[0])
