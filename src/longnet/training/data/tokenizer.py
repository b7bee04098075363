"""Tokenizers: bytes, or those of the ``tokenizers`` library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from longnet.training.files import write_text

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>")
"""Tokens that end a document where a tokenizer does not say which of its own does."""


_PART, _TOGETHER = 1 << 16, 64


def cut_text(text: bytes, size: int) -> list[bytes]:
    """A text in parts of about ``size`` bytes: they begin at a line that begins with no white space, where there is one.

    Tokenizers split text there too, but for blank lines: of 2.9 million tokens of source code 46 were others than uncut.
    """
    parts, start = [], 0
    while len(text) - start > size:
        end = last_line(text, start, start + size) or whole_character(text, start + size)
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def last_line(text: bytes, start: int, stop: int) -> int:
    """The last place in (start, stop) where a line begins with no white space; 0 if there is none."""
    end = stop
    while (end := text.rfind(b"\n", start, end - 1) + 1) > start:
        if not text[end : end + 1].isspace():
            return end
    return 0


def whole_character(text: bytes, place: int) -> int:
    """The place, or that of the UTF-8 character which it would cut."""
    for first in range(place - 1, max(place - 4, -1), -1):
        if text[first] >= 0xC0:
            length = 2 + (text[first] >= 0xE0) + (text[first] >= 0xF0)
            return first if first + length > place else place
        if text[first] < 0x80:
            break
    return place


class Tokenizer(Protocol):
    """What turns text into tokens and back.

    Attributes:
        vocab_size: tokens are below it.
        end: the token after each document; None for none.
        digest: SHA-256 (hex) of what the tokenizer does.
    """

    vocab_size: int
    end: int | None
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

    def decode(self, tokens: np.ndarray) -> bytes:
        """The text of tokens."""

    def reader(self, before: np.ndarray) -> Callable[[int], bytes]:
        """A function that takes the tokens after ``before`` one by one, and gives what is known of their text by then."""

    def save(self, folder: Path) -> None:
        """Write it into a folder, from which :func:`read_tokenizer` reads it."""


class _Bytes(Tokenizer):
    vocab_size, end = 256, None
    digest = hashlib.sha256(b"bytes").hexdigest()
    is_bytes = True

    def encode(self, texts: Sequence[bytes]) -> Iterator[np.ndarray]:
        return (np.frombuffer(text, dtype=np.uint8) for text in texts)

    def decode(self, tokens: np.ndarray) -> bytes:
        return np.asarray(tokens).astype(np.uint8).tobytes()

    def reader(self, before: np.ndarray) -> Callable[[int], bytes]:
        return lambda token: bytes([token])

    def save(self, folder: Path) -> None:
        pass


BYTES: Tokenizer = _Bytes()


class _Tokens(Tokenizer):
    """Of a ``tokenizer.json``."""

    is_bytes = False

    def __init__(self, text: str, end: str | None) -> None:
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        # As trained: the file may ask for the opposite.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._text, self.vocab_size = text, max(self._tokenizer.get_vocab().values(), default=-1) + 1
        if end is not None and self._tokenizer.token_to_id(end) is None:
            raise ValueError(f"eos_token={end!r} is none of its tokens")
        names = END_OF_DOCUMENT if end is None else (end,)
        self.end = next((token for name in names if (token := self._tokenizer.token_to_id(name)) is not None), None)
        self.digest = hashlib.sha256(f"{text}\0{self.end}".encode()).hexdigest()

    def encode(self, texts: Sequence[bytes]) -> Iterator[np.ndarray]:
        # The library's threads take a text each, and keep far more of it than its tokens: short parts, a few at a time.
        parts = [(number, part) for number, text in enumerate(texts) for part in cut_text(text, _PART)]
        found: list[list[np.ndarray]] = [[] for _ in texts]
        given = 0
        for first in range(0, len(parts), _TOGETHER):
            some = parts[first : first + _TOGETHER]
            strings = [part.decode("utf-8", "replace") for _, part in some]
            encoded = self._tokenizer.encode_batch_fast(strings, add_special_tokens=False)
            for (number, _), one in zip(some, encoded, strict=True):
                found[number].append(np.array(one.ids, dtype=self.dtype))
            while given < some[-1][0]:
                yield np.concatenate(found[given])
                found[given], given = [], given + 1
        if given < len(texts):
            yield np.concatenate(found[given])

    def decode(self, tokens: np.ndarray) -> bytes:
        text: str = self._tokenizer.decode(np.asarray(tokens).tolist())
        return text.encode()

    def reader(self, before: np.ndarray) -> Callable[[int], bytes]:
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        for token in before.tolist():
            stream.step(self._tokenizer, token)
        return lambda token: (stream.step(self._tokenizer, token) or "").encode()

    def save(self, folder: Path) -> None:
        write_text(folder / TOKENIZER_FILES[0], self._text)
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
        eos = json.loads(beside.read_text(encoding="utf-8")).get("eos_token")
        end = eos.get("content") if isinstance(eos, dict) else eos
    try:
        return _Tokens(file.read_text(encoding="utf-8"), end)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # What the library raises has no class of its own.
        raise ValueError(
            f"tokenizer={str(name)!r}: {file} is no tokenizer of the tokenizers library: {error}"
        ) from None


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
