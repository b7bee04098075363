"""Tokens on disk, and the windows that training draws from them."""

from __future__ import annotations

import weakref
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longnet.training.files import read_into

if TYPE_CHECKING:  # Preparing data takes no torch.
    from torch import Tensor


class TokensOnDisk:
    """A file of tokens as an array (tokens,) that is read piece by piece: a slice of it is an array.

    The file is not mapped: a mapped file that becomes shorter ends the process.

    Args:
        path: the file. It stays open.
        dtype: of a token.

    Attributes:
        size: tokens of the file.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, dtype: str | np.dtype[Any] = "uint8") -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        self.size = path.stat().st_size // self.dtype.itemsize
        self._file = FileIO(path)
        weakref.finalize(self, self._file.close)

    def __getitem__(self, place: slice) -> np.ndarray:
        """The tokens of a slice without a step.

        Raises:
            ValueError: the file has become shorter.
        """
        start, stop, step = place.indices(self.size)
        if step != 1:
            raise ValueError(f"step={step} in a slice of {self.path}: expected none")
        content = np.empty(max(0, stop - start), dtype=self.dtype)
        self._file.seek(start * self.dtype.itemsize)
        if (done := read_into(self._file, content.view(np.uint8).data)) < content.nbytes:
            raise ValueError(
                f"{self.path} has become shorter while it was read: the tokens from "
                f"{start + done // self.dtype.itemsize:,} to {stop:,} are missing. A run that has begun continues from its last "
                "checkpoint with --resume once the file is whole again"
            )
        return content

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)


Stream = np.ndarray | TokensOnDisk


def draw_windows(stream: Stream, context: int, count: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """The windows of one training step, uniform over the stream; they depend on the arguments alone.

    Args:
        stream: (tokens,).
        context: tokens per window, N.
        count: windows, B.
        seed, step: non-negative, below 2 ** 63.

    Returns:
        ``(tokens, targets)``, each (B, N) int64, the targets one token further on.

    Raises:
        ValueError: the stream is shorter than one window and its last target.
    """
    return cut_windows(stream, context, draw_starts(stream, context, count, seed, step))


def draw_starts(stream: Stream, context: int, count: int, seed: int, step: int) -> np.ndarray:
    """Where the windows of :func:`draw_windows` begin: (B,) int64.

    A counter-based generator keyed by ``(seed, step)`` gives the starts: any step can be drawn again without the previous ones.
    """
    count_of_starts = count_starts(stream, context)
    generator = np.random.Philox(key=np.array([seed, step], dtype=np.uint64))
    # Raw words, not Generator.integers: the algorithm fixes their sequence, in every version of numpy.
    starts = generator.random_raw(count) % np.uint64(count_of_starts)
    return starts.astype(np.int64)


def count_starts(stream: Stream, context: int) -> int:
    """The number of window starts; raise ValueError for none."""
    starts = int(stream.size) - context
    if starts < 1:
        raise ValueError(
            f"context={context} needs {context + 1} tokens in a row: the training data holds {stream.size}"
        )
    return starts


def cut_windows(stream: Stream, context: int, starts: np.ndarray) -> tuple[Tensor, Tensor]:
    """The windows that begin at ``starts`` (B,): ``(tokens, targets)``, each (B, context) int64."""
    import torch

    rows = np.stack([stream[start : start + context + 1] for start in starts.tolist()]).astype(np.int64)
    both = torch.from_numpy(rows)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def pack_windows(
    tokens: Tensor, targets: Tensor, documents: np.ndarray, starts: np.ndarray
) -> tuple[Tensor, Tensor, list[int]]:
    """Windows as one row of documents: tokens and targets, (1, B * N), and what ``cu_seqlens`` is.

    A window begins a document, whatever it begins with. After the last token of a document comes another document: its target
    is -100, which does not count.

    Args:
        tokens, targets: (B, N).
        documents: (documents,) int64, rising: the tokens of the stream at which documents begin.
        starts: (B,) of the windows in the stream.
    """
    import torch

    context, targets, bounds = tokens.shape[1], targets.clone(), []
    for number, start in enumerate(starts.tolist()):
        low, high = np.searchsorted(documents, (start + 1, start + context + 1))
        begins = documents[low:high] - start
        targets[number, torch.from_numpy(begins - 1)] = -100
        bounds += [number * context, *(number * context + begins[begins < context]).tolist()]
    return tokens.reshape(1, -1), targets.reshape(1, -1), [*bounds, tokens.numel()]
