"""The next token of a stream where queries read bands, in two launches: parts of rows, then every head mixes its parts.

Nothing is read on the host, and shapes are those of the tables whatever the position, so a CUDA graph can repeat them. Numbers of
a reader, see :class:`.band_tables.BandTables`: segment length (0 without end), rate, block, whether it is the window's ring,
offset, first row of the storage, rows, key/value head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longnet.attention.streaming.kernels import _absorb


@triton.jit
def _chosen_before(place, offset, rate, block):
    """How many positions of a segment a head selects before a place in it; the device's view of ``geometry.rows``."""
    cycle = place // (rate * block)
    rest = place - (cycle * rate + offset) * block
    return cycle * block + tl.minimum(tl.maximum(rest, 0), block)


@triton.jit
def parts_kernel(
    Q, K, V, KEYS, VALUES, OUT, LSE, POSITION, SEEN, PADDING, OFFSETS, READERS, MEMBERS, PARTS,
    q_at, k_at, v_at, cache_rows, parts, tiles,
    SHARE: tl.constexpr, SHARE_BLOCK: tl.constexpr, PRODUCTS: tl.constexpr, BY_ROW: tl.constexpr, DILATED: tl.constexpr,
    D: tl.constexpr, D_BLOCK: tl.constexpr, ROWS: tl.constexpr, SCALE: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One part of one reader's rows, ``tiles`` times ``ROWS`` of them; the part that holds the new token's row writes it too."""
    program = tl.program_id(0)
    part = program % parts
    batch = tl.cast(program // parts, tl.int64)
    position = tl.load(POSITION)
    if program == 0:
        # The other kernel moves the position on, and every program of it has to know this one.
        tl.store(SEEN, position)
    reader = tl.load(PARTS + part * 2)
    low = tl.load(PARTS + part * 2 + 1)
    numbers = READERS + reader * 8
    length, rate, block = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    is_ring, offset = tl.load(numbers + 3) != 0, tl.load(numbers + 4)
    first, rows, kv_head = tl.load(numbers + 5), tl.load(numbers + 6), tl.load(numbers + 7)
    padding = tl.load(PADDING + batch)

    # Where the new token stands; the ring is a segment of its own length.
    origin = position * 0
    period = tl.where(length > 0, length, rate * block)
    if BY_ROW:
        shift = tl.load(OFFSETS + batch)
        origin = tl.where(is_ring, 0, (shift % period + period) % period)
    on_grid = position + origin
    place = tl.where(length > 0, on_grid % period, on_grid)
    base = tl.where(length > 0, 0, _chosen_before(origin, offset, rate, block))
    new_row = _chosen_before(place, offset, rate, block) - base
    selected = (place // block % rate) == offset
    padded = tl.maximum(padding - (position - place), 0)
    hidden = _chosen_before(padded, offset, rate, block) - base
    # Rows of the ring are read all around, those of a segment up to the new one.
    last = tl.where(is_ring, tl.minimum(position, rows), new_row)
    g = tl.arange(0, SHARE_BLOCK)
    stored = (program * SHARE + g).to(tl.int64)
    here = selected & (new_row >= low) & (new_row < low + tiles * ROWS) & (new_row < rows)
    unread = (low >= last) & (here == 0)
    if DILATED:
        unread = unread | (selected == 0)
    if unread:
        tl.store(LSE + stored, tl.full([SHARE_BLOCK], float("-inf"), KIND), mask=g < SHARE)
        return

    head = tl.load(MEMBERS + reader * SHARE + g, mask=g < SHARE, other=-1).to(tl.int64)
    d, n = tl.arange(0, D_BLOCK), tl.arange(0, ROWS)
    d_ok = d < D
    q_ok = (head >= 0)[:, None] & d_ok[None, :]
    q = tl.load(Q + batch * q_at[0] + head[:, None] * q_at[1] + d[None, :], mask=q_ok, other=0.0)
    wide = q.to(KIND)
    stretch = (batch * cache_rows + first) * D
    # Rows are numbers of 32 bits from here on.
    new_row, hidden = tl.minimum(new_row, rows).to(tl.int32), tl.minimum(hidden, rows).to(tl.int32)
    last, reach = tl.minimum(last, rows).to(tl.int32), tl.minimum(position - padding, rows).to(tl.int32)
    around = rows.to(tl.int32)
    row_max = tl.full([SHARE_BLOCK], float("-inf"), KIND)
    row_sum = tl.zeros([SHARE_BLOCK], KIND)
    acc = tl.zeros([SHARE_BLOCK, D_BLOCK], KIND)
    inside = n[:, None] * D + d[None, :]
    for tile in tl.range(0, tiles):
        start = low + tile * ROWS
        row = start + n
        # Tokens since the one in a row of the ring.
        age = new_row - row + tl.where(row > new_row, around, 0)
        ok = tl.where(is_ring, (age > 0) & (age <= reach), row >= hidden) & (row < last)
        tile_at = stretch + tl.cast(start, tl.int64) * D
        k = tl.load(KEYS + tile_at + inside, mask=ok[:, None] & d_ok[None, :], other=0.0)
        v = tl.load(VALUES + tile_at + inside, mask=ok[:, None] & d_ok[None, :], other=0.0)
        if PRODUCTS:
            s = tl.dot(q, tl.trans(k)) * SCALE
        else:
            s = tl.sum(wide[:, None, :] * k.to(KIND)[None, :, :], 2) * SCALE
        s = tl.where(ok[None, :], s, float("-inf"))
        new = tl.maximum(row_max, tl.max(s, 1))
        # Before the first key both are -inf, and their difference would be NaN.
        top = tl.where(new == float("-inf"), 0.0, new)
        p, rescale = tl.exp(s - top[:, None]), tl.exp(row_max - top)
        row_max, row_sum = new, row_sum * rescale + tl.sum(p, 1)
        if PRODUCTS:
            acc = acc * rescale[:, None] + tl.dot(p.to(v.dtype), v)
        else:
            acc = acc * rescale[:, None] + tl.sum(p[:, :, None] * v.to(KIND)[None, :, :], 1)
    if here:
        k_new = tl.load(K + batch * k_at[0] + kv_head * k_at[1] + d, mask=d_ok, other=0.0)
        v_new = tl.load(V + batch * v_at[0] + kv_head * v_at[1] + d, mask=d_ok, other=0.0)
        at = stretch + tl.cast(new_row, tl.int64) * D + d
        tl.store(KEYS + at, k_new, mask=d_ok)
        tl.store(VALUES + at, v_new, mask=d_ok)
        if position >= padding:
            own = tl.sum(wide * k_new.to(KIND)[None, :], 1) * SCALE
            both = tl.maximum(row_max, own)
            before, weight = tl.exp(row_max - both), tl.exp(own - both)
            row_max, row_sum = both, row_sum * before + weight
            acc = acc * before[:, None] + weight[:, None] * v_new.to(KIND)[None, :]
    some = row_sum > 0
    total = tl.where(some, row_sum, 1.0)
    is_stored = (g < SHARE)[:, None] & d_ok[None, :]
    tl.store(OUT + stored[:, None] * D + d[None, :], acc / total[:, None], mask=is_stored)
    tl.store(LSE + stored, tl.where(some, row_max + tl.log(total), float("-inf")), mask=g < SHARE)


@triton.jit
def mix_bands_kernel(
    OUT_PARTS, LSE_PARTS, OUT, LSE, POSITION, SEEN, OF_HEADS, out_at, heads, parts,
    BANDS: tl.constexpr, PARTS: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """One head's output: its parts of every band, by their softmax denominators."""
    program = tl.program_id(0)
    head = program % heads
    batch = program // heads
    d, n = tl.arange(0, D_BLOCK), tl.arange(0, PARTS)
    d_ok = d < D
    row_max = tl.full([1], float("-inf"), KIND)
    row_sum = tl.zeros([1], KIND)
    acc = tl.zeros([D_BLOCK], KIND)
    for i in tl.static_range(BANDS):
        entry = OF_HEADS + (i * heads + head) * 3
        first, count, place = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        part = ((batch * parts + first + n) * SHARE + place).to(tl.int64)
        lse = tl.load(LSE_PARTS + part, mask=n < count, other=float("-inf"))
        # Parts without keys have no output.
        some = lse > float("-inf")
        out = tl.load(OUT_PARTS + part[:, None] * D + d[None, :], mask=some[:, None] & d_ok[None, :], other=0.0)
        row_max, row_sum, acc = _absorb(lse, out, row_max, row_sum, acc)
    some = row_sum > 0
    total = tl.where(some, row_sum, 1.0)
    acc = tl.where(some, acc / total, 0.0)
    at = tl.cast(batch, tl.int64) * out_at[0] + tl.cast(head, tl.int64) * out_at[1]
    tl.store(OUT + at + d, acc.to(OUT.dtype.element_ty), mask=d_ok)
    tl.store(LSE + program + tl.arange(0, 1), tl.where(some, row_max + tl.log(total), float("-inf")))
    if program == 0:
        tl.store(POSITION, tl.load(SEEN) + 1)
