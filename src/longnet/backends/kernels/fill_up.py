"""Copies with zeros at the end of tokens and channels, for kernels that read tensors in whole units of both."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fill_up_kernel(
    X, ROOM, x_at, length, filled, heads, tiles, CHANNELS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """``ROWS`` tokens of a head of X (B, H, length, CHANNELS) into ROOM (B, H, filled, D), contiguous."""
    program = tl.program_id(0)
    rows = (program % tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    place = (program // tiles).to(tl.int64)
    channels = tl.arange(0, D)[None, :]
    source = X + place // heads * x_at[0] + place % heads * x_at[1] + rows * x_at[2] + channels
    x = tl.load(source, mask=(rows < length) & (channels < CHANNELS), other=0.0)
    tl.store(ROOM + (place * filled + rows) * D + channels, x, mask=rows < filled)
