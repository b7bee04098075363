"""The next token of a stream in two launches: heads read their rows in parts, then every head mixes its parts.

Nothing is read on the host, and shapes are those of the pattern whatever the position, so a CUDA graph can repeat them. In
every branch at most ``ceil(H / r)`` heads select a position: each is a *lane*. Tuples hold one value per branch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longnet.attention.backends.triton.kernels.rows import head_offset, pick


@triton.jit
def _absorb(scores, values, row_max, row_sum, acc):
    """(row_max, row_sum, acc) of an online softmax after (n,) more scores, some of them -inf, and their (n, D) values."""
    new = tl.maximum(row_max, tl.max(scores, 0))
    # Before the first key both are -inf, and their difference would be NaN.
    base = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp(scores - base)
    rescale = tl.exp(row_max - base)
    return new, row_sum * rescale + tl.sum(p, 0), acc * rescale + tl.sum(p[:, None] * values, 0)


@triton.jit
def lanes_kernel(
    Q, K, V, KEYS, VALUES, OUT, LSE, POSITION, SEEN, PADDING, FIRST_ROWS,
    q_at, k_at, v_at, cache_rows, heads, group, lanes, splits, tiles, lengths, rates, counts, first_lanes,
    BRANCHES: tl.constexpr, BLOCKED: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    SCALE: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One part of one lane's rows, ``tiles`` times ``ROWS`` of them; the part that holds the new token's row writes it too."""
    program = tl.program_id(0)
    split = program % splits
    lane = program // splits % lanes
    batch = tl.cast(program // (splits * lanes), tl.int64)
    position = tl.load(POSITION)
    if program == 0:
        # The other kernel moves the position on, and every program of it has to know this one.
        tl.store(SEEN, position)
    branch = 0
    for i in tl.static_range(1, BRANCHES):
        branch = tl.where(lane >= first_lanes[i], i, branch)
    length, rate = pick(lengths, branch), pick(rates, branch)
    spread = lane - pick(first_lanes, branch)
    local = position % length
    last = (local // rate).to(tl.int32)
    offset = (local % rate).to(tl.int32)
    if BLOCKED:
        head = offset * pick(counts, branch) + spread
    else:
        head = offset + spread * rate
    low = split * ROWS * tiles
    if (head >= heads) | (low > last):
        tl.store(LSE + program, float("-inf"))
        return
    head = head.to(tl.int32)
    first = tl.load(FIRST_ROWS + branch * heads + head)
    # The segment's first selected row stands at position - last * rate; rows before the first real token are padding.
    before = tl.load(PADDING + batch) - (position - tl.cast(last, tl.int64) * rate)
    hidden = ((tl.maximum(before, 0) + rate - 1) // rate).to(tl.int32)
    d = tl.arange(0, D_BLOCK)
    d_ok = d < D
    q = tl.load(Q + batch * q_at[0] + tl.cast(head, tl.int64) * q_at[1] + d, mask=d_ok, other=0.0).to(KIND) * SCALE
    # Multiples of D, as copies of many bytes at once need to know.
    rows = (batch * cache_rows + first) * D
    row_max = tl.full([1], float("-inf"), KIND)
    row_sum = tl.zeros([1], KIND)
    acc = tl.zeros([D_BLOCK], KIND)
    n = tl.arange(0, ROWS)
    inside = n[:, None] * D + d[None, :]
    for tile in tl.range(0, tiles):
        start = low + tile * ROWS
        row = start + n
        ok = (row >= hidden) & (row < last)
        at = rows + tl.cast(start, tl.int64) * D + inside
        k = tl.load(KEYS + at, mask=ok[:, None] & d_ok[None, :], other=0.0).to(KIND)
        v = tl.load(VALUES + at, mask=ok[:, None] & d_ok[None, :], other=0.0).to(KIND)
        s = tl.where(ok, tl.sum(k * q[None, :], 1), float("-inf"))
        row_max, row_sum, acc = _absorb(s, v, row_max, row_sum, acc)
    if last < low + ROWS * tiles:
        kv_head = tl.cast(head // group, tl.int64)
        k_new = tl.load(K + batch * k_at[0] + kv_head * k_at[1] + d, mask=d_ok, other=0.0)
        v_new = tl.load(V + batch * v_at[0] + kv_head * v_at[1] + d, mask=d_ok, other=0.0)
        at = rows + tl.cast(last, tl.int64) * D + d
        # Lanes of one row write the same; none reads it in this step.
        tl.store(KEYS + at, k_new, mask=d_ok)
        tl.store(VALUES + at, v_new, mask=d_ok)
        if last >= hidden:
            s = tl.sum(tl.where(d_ok, k_new.to(KIND) * q, 0.0), 0)
            new = tl.maximum(row_max, s)
            rescale, p = tl.exp(row_max - new), tl.exp(s - new)
            row_sum = row_sum * rescale + p
            acc = acc * rescale + p * v_new.to(KIND)
            row_max = new
    some = row_sum > 0
    acc = tl.where(some, acc / tl.where(some, row_sum, 1.0), 0.0)
    tl.store(OUT + tl.cast(program, tl.int64) * D + d, acc, mask=d_ok)
    lse = tl.where(some, row_max + tl.log(tl.where(some, row_sum, 1.0)), float("-inf"))
    tl.store(LSE + program + tl.arange(0, 1), lse)


@triton.jit
def mix_kernel(
    PARTS, LSE, OUT, POSITION, SEEN, out_at, heads, lanes, splits, lengths, rates, counts, first_lanes,
    BRANCHES: tl.constexpr, BLOCKED: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One head's output: its parts of every branch in which it selects the position, by their softmax denominators."""
    program = tl.program_id(0)
    head = program % heads
    batch = program // heads
    position = tl.load(SEEN)
    d = tl.arange(0, D_BLOCK)
    d_ok = d < D
    row_max = tl.full([1], float("-inf"), KIND)
    row_sum = tl.zeros([1], KIND)
    acc = tl.zeros([D_BLOCK], KIND)
    # Parts of all branches side by side, so that reads do not wait for one another.
    for start in tl.static_range(0, BRANCHES * SPLITS, PARTS_BLOCK):
        number = start + tl.arange(0, PARTS_BLOCK)
        branch, split = number // SPLITS, number % SPLITS
        lane, some_splits = branch * 0, branch * 0
        for i in tl.static_range(BRANCHES):
            offset = position % lengths[i] % rates[i]
            if BLOCKED:
                spread = head % counts[i]
            else:
                spread = head // rates[i]
            is_selected = offset == head_offset(head, rates[i], heads, BLOCKED)
            lane = tl.where(branch == i, first_lanes[i] + spread, lane)
            some_splits = tl.where((branch == i) & is_selected, splits, some_splits)
        part = (batch * lanes + lane) * splits + split
        lse = tl.load(LSE + part, mask=split < some_splits, other=float("-inf"))
        # Parts without keys have no output.
        some = lse > float("-inf")
        at = part[:, None].to(tl.int64) * D + d[None, :]
        out = tl.load(PARTS + at, mask=some[:, None] & d_ok[None, :], other=0.0)
        row_max, row_sum, acc = _absorb(lse, out, row_max, row_sum, acc)
    acc = tl.where(row_sum > 0, acc / tl.where(row_sum > 0, row_sum, 1.0), 0.0)
    at = tl.cast(batch, tl.int64) * out_at[0] + tl.cast(head, tl.int64) * out_at[1]
    tl.store(OUT + at + d, acc.to(OUT.dtype.element_ty), mask=d_ok)
    if program == 0:
        tl.store(POSITION, position + 1)
