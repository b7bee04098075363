"""How much of a padding mask comes before each token, for kernels that skip the mask where there is no padding."""

from __future__ import annotations

import triton
import triton.language as tl

# That are counted together.
TOKENS = tl.constexpr(64)


@triton.jit
def count_padding_kernel(PADDING, COUNTS, padding_at, length, GROUPS: tl.constexpr):
    """COUNTS (B, groups + 1) int32, contiguous: of each row of the mask (B, N), padded tokens before each group of ``TOKENS``.

    A program counts a row, ``GROUPS`` groups at a time.
    """
    batch = tl.program_id(0).to(tl.int64)
    groups = tl.cdiv(length, TOKENS)
    counts = COUNTS + batch * (groups + 1)
    tl.store(counts, 0)
    before = 0
    for start in tl.range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)
        token = group[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        rows = PADDING + batch * padding_at[0] + token.to(tl.int64) * padding_at[1]
        count = tl.sum((tl.load(rows, mask=token < length, other=0) != 0).to(tl.int32), 1)
        tl.store(counts + 1 + group, before + tl.cumsum(count, 0), mask=group < groups)
        before += tl.sum(count, 0)
