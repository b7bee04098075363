"""Copies with zeros at the end of tokens and channels, for kernels that read tensors in whole units of both."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pad_for_tma_kernel(
    A, B, C, E, ROOM, PADDING, a_at, b_at, c_at, e_at, padding_at, length, filled, heads, tiles, programs,
    CHANNELS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``ROWS`` tokens of a head of one of four tensors (B, H, length, CHANNELS), into ROOM (4, B, H, filled, D), contiguous.

    PADDING is the mask (B, length) int8, or None: padded tokens become zeros. Each tensor has ``programs`` programs, and those
    of the first tensor come first.
    """
    number = tl.program_id(0) // programs
    program = tl.program_id(0) % programs
    rows = (program % tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    place = (program // tiles).to(tl.int64)
    channels = tl.arange(0, D)[None, :]
    # Strides may differ in width and be constants, and have to be of one type.
    none = (number * 0).to(tl.int64)
    source, by_batch, by_head, by_token = A, none + a_at[0], none + a_at[1], none + a_at[2]
    if number == 1:
        source, by_batch, by_head, by_token = B, none + b_at[0], none + b_at[1], none + b_at[2]
    if number == 2:
        source, by_batch, by_head, by_token = C, none + c_at[0], none + c_at[1], none + c_at[2]
    if number == 3:
        source, by_batch, by_head, by_token = E, none + e_at[0], none + e_at[1], none + e_at[2]
    source += place // heads * by_batch + place % heads * by_head + rows * by_token + channels
    there = rows < length
    if PADDING is not None:
        there &= tl.load(PADDING + place // heads * padding_at[0] + rows * padding_at[1], mask=there, other=1) == 0
    x = tl.load(source, mask=there & (channels < CHANNELS), other=0.0)
    at = (number * (programs // tiles) + place) * filled + rows
    tl.store(ROOM + at * D + channels, x, mask=rows < filled)
