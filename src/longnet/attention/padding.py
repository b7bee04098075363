"""Rows padded on the left: segments are counted from the padding, so such a row differs from the row alone. That is said."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from longnet.geometry import Pattern

# One text: Python's own filter shows it once.
_MOVED = (
    "a row is padded on the left: its segments and strides are counted from the padding, so its result differs from that of "
    "the row alone. Pad on the right, pack rows as documents (cu_seqlens, or position_ids of Hugging Face models), or give one "
    "row at a time."
)


def leading_padding(key_padding_mask: Tensor) -> Tensor:
    """How many padded tokens each row begins with: (B, N) bool to (B,) int64, computed on the mask's device."""
    return key_padding_mask.long().cumprod(1).sum(1)


def warn_left_padding(
    key_padding_mask: Tensor,
    pattern: Pattern,
    bounds: Sequence[int] | None = None,
    *,
    segment_offset: int = 0,
    first: bool = False,
) -> None:
    """Warn if leading padding moves a row's segments.

    Looking at a mask makes the host wait for its device. So it is done for every mask on the CPU, elsewhere for a ``first`` one
    alone, and never while a CUDA graph is captured. Not to be called while torch.compile traces.

    Args:
        key_padding_mask: (B, N) bool, True where a token is padding.
        bounds: where the documents begin that are packed into one row, B = 1, and N; each is a row of its own.
        segment_offset: of the pattern's grid.
        first: whether the caller has not passed a mask of a device before.
    """
    if not _may_look(key_padding_mask, first) or not key_padding_mask.numel():
        return
    if bounds is None:
        begins, lengths = key_padding_mask[:, 0], [key_padding_mask.shape[1]] * len(key_padding_mask)
    else:
        lengths = [stop - start for start, stop in pairwise(bounds) if stop > start]
        begins = key_padding_mask[0, [0, *accumulate(lengths[:-1])]]
    if begins.any():
        rows = key_padding_mask.flatten().split(lengths)
        leading = [int(leading_padding(row[None])) for row in rows]
        warn_moved_rows(zip(leading, lengths, strict=True), pattern, segment_offset)


def warn_moved_rows(rows: Iterable[tuple[int, int | None]], pattern: Pattern, segment_offset: int = 0) -> None:
    """Warn if one of these rows does not have the segments that it has alone.

    Args:
        rows: tokens of leading padding, and all tokens, padding included; None for a stream that goes on.
    """
    if any(_moves(padding, tokens, pattern, segment_offset) for padding, tokens in rows):
        warnings.warn(_MOVED, UserWarning, stacklevel=2)


def _moves(padding: int, tokens: int | None, pattern: Pattern, segment_offset: int) -> bool:
    length = None if tokens is None else tokens - padding
    is_own = (branch.is_own_sequence(padding, length, segment_offset) for branch in pattern.branches)
    return length != 0 and not all(is_own)


def _may_look(mask: Tensor, first: bool) -> bool:
    # Fake tensors and other subclasses hold nothing to look at.
    if type(mask) is not Tensor or mask.is_meta or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    if mask.device.type == "cpu":
        return True
    return first and not (mask.is_cuda and torch.cuda.is_current_stream_capturing())
