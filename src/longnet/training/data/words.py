"""Tokens of text by a table of its words: most words of a text have been met before, and a tokenizer takes far longer to split
them than a table to find them. The tokens are exactly those of the whole text."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import chain, count, islice
from typing import Any

import numpy as np

# Everything that these tokenizers match stops at both kinds of places: before a space that an ASCII letter or digit follows, and
# between a letter or digit and the ASCII mark or white space after it (but "'", and control characters, which BERT's removes).
_A = "0-9A-Za-z"
_JOINING = r"'\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\U0010ffff"
_WORDS = re.compile(rf"[^{_A}]+(?= [{_A}])|[^{_A}]*[{_A}]+(?:[{_JOINING}](?:[^ {_A}]| (?![{_A}]))*[{_A}]*)*|[^{_A}]+")
# Places at which no special token is cut either: these hold no white space. The second kind ends a line of any script.
_PLACES = re.compile(rf"(?= [{_A}])|(?<=\S\n)(?=[^\s/])")
# Words that may stand in lines: with a newline between them each has the tokens that it has alone.
_LINE = re.compile(rf"(?=[^\s/]| [{_A}])[^\r\n]*[{_A}]")
# Words that may stand after " a": it ends at a place, and no other token is that of " a".
_MARK = re.compile(rf"(?! a)[^{_A}{_JOINING}]")
_LONG_WORD, _MOST_TOKENS = 256, 1 << 21

_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = (_SPLIT % r"\p{N}{1,3}", _SPLIT % r"\p{N}")  # Of Llama 3 and GPT-4, of Qwen.


def is_known(spec: dict[str, Any]) -> bool:
    """Whether the tokenizer of a ``tokenizer.json`` splits text at the places of this module.

    These are GPT-2's (``longnet tokenizer train`` makes such), Llama 3's, Qwen's and BERT's ways to split.
    """
    normalizer, first = spec.get("normalizer"), spec.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", [first])
    if any(one["lstrip"] or one["rstrip"] or re.search(r"\s", one["content"]) for one in spec.get("added_tokens", [])):
        return False
    if normalizer is not None and any(one["normalized"] for one in spec.get("added_tokens", [])):
        return False
    if spec["model"].get("dropout"):
        return False
    kinds, name = [one.get("type") for one in steps], (normalizer or {}).get("type")
    if kinds == ["BertPreTokenizer"]:
        return name in (None, "BertNormalizer")
    if name not in (None, "NFC") or kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        return False
    if steps[-1]["add_prefix_space"] or steps[-1].get("use_regex", True) != (len(steps) == 1):
        return False
    split = steps[0]
    return len(steps) == 1 or (
        split["pattern"].get("Regex") in _SPLITS and split["behavior"] == "Isolated" and not split["invert"]
    )


def last_place(text: str) -> int:
    """The last of the places at which a text may be cut without a change of tokens; 0 for none."""
    return max((found.start() for found in _PLACES.finditer(text)), default=0)


def cut_text(text: str, size: int) -> Iterator[str]:
    """A text in parts of ``size`` characters or little more, or much more if it has no place to be cut."""
    start = 0
    while (place := _PLACES.search(text, start + size)) is not None and place.start() < len(text):
        yield text[start : place.start()]
        start = place.start()
    yield text[start:]


class WordTable:
    """The tokens of the words that were met; it begins anew when it holds two million tokens.

    Args:
        encode: gives the ids of each of some texts.
        dtype: of a token.
    """

    def __init__(self, encode: Callable[[list[str]], list[list[int]]], dtype: str) -> None:
        self._encode, self._dtype = encode, dtype
        newline, letter, bare = encode(["\n", " a", "a"])
        self._joins = [("\n", newline[0], _LINE.fullmatch)] if len(newline) == 1 else []
        if len(letter) == 1 and letter != bare:
            self._joins.append((" a", letter[0], _MARK.match))
        self._clear()

    def _clear(self) -> None:
        self._rows: defaultdict[str, int] = defaultdict(count().__next__)
        self._tokens = np.empty(0, dtype=self._dtype)
        self._starts, self._lengths = np.empty((2, 0), dtype=np.int64)

    def tokens(self, texts: list[str]) -> list[np.ndarray]:
        """The tokens of each text, (tokens,)."""
        if self._tokens.size > _MOST_TOKENS:
            self._clear()
        words = [_words(text) for text in texts]
        total = sum(map(len, words))
        # A word that is not in the table gets the next row by this.
        rows = np.fromiter(map(self._rows.__getitem__, chain.from_iterable(words)), np.int64, total)
        self._learn(list(islice(reversed(self._rows), len(self._rows) - self._lengths.size))[::-1])
        lengths, starts = self._lengths[rows], self._starts[rows]
        ends = lengths.cumsum()
        found = self._tokens[np.arange(lengths.sum()) + np.repeat(starts - (ends - lengths), lengths)]
        bounds = np.append(0, ends)[np.cumsum([len(one) for one in words])]
        return np.split(found, bounds)[:-1]

    def _learn(self, words: list[str]) -> None:
        order: list[int] = []
        tokens, lengths, rest = [self._tokens], [np.empty(0, np.int64)], list(range(len(words)))
        for between, token, fits in self._joins:
            chosen = [number for number in rest if fits(words[number])]
            found, sizes = self._encode_joined([words[number] for number in chosen], between, token)
            if sizes.size == len(chosen):  # Else a token for unknown text stands for what is between words too.
                order, tokens, lengths = [*order, *chosen], [*tokens, found], [*lengths, sizes]
                rest = list(set(rest).difference(chosen))
        ids = self._encode([words[number] for number in rest])
        lengths.append(np.fromiter(map(len, ids), np.int64, len(ids)))
        tokens.append(np.fromiter(chain.from_iterable(ids), self._dtype))
        sizes, known = np.concatenate(lengths), self._lengths.size
        self._starts, self._lengths = np.concatenate(
            [[self._starts, self._lengths], np.empty((2, len(words)), np.int64)], 1
        )
        self._lengths[known:][order + rest] = sizes
        self._starts[known:][order + rest] = self._tokens.size + sizes.cumsum() - sizes
        self._tokens = np.concatenate(tokens)

    def _encode_joined(self, words: list[str], between: str, token: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and their number for each word, of hundreds at once: one text for each takes several times as long."""
        texts = [between + between.join(words[start : start + 512]) for start in range(0, len(words), 512)]
        found = np.fromiter(chain.from_iterable(self._encode(texts)), self._dtype)
        is_between = found == token
        return found[~is_between], np.diff(np.flatnonzero(is_between), append=found.size) - 1


def _words(text: str) -> list[str]:
    words = _WORDS.findall(text)
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    for number in np.flatnonzero(lengths > _LONG_WORD)[::-1].tolist():
        words[number : number + 1] = _PLACES.split(words[number])
    return words
