"""The gradient of the relative bias, by distance, without atomics.

A program owns a head and a block of consecutive distances of one branch. It sweeps query blocks; the keys that these
distances reach form a window as long as two blocks. Score gradients of all its (query, window key) tiles are added up
element by element: a distance is the same diagonal in each of them, so diagonals are summed once, at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longnet.attention.backends.triton.kernels.rows import LOG2E, bias_of, extras_of, head_offset, head_rows, padding_of


@triton.jit
def bias_kernel(
    Q, K, V, GRAD_OUT, LSE, DELTA, PADDING, BIAS, PARTS,
    q_at, k_at, v_at, grad_at, lse_at, padding_at, bias_at,
    length, heads, group, scale, segment_length, rate, segments, units, share, blocks, rows, distances,
    C: tl.constexpr,
):  # fmt: skip
    """PARTS (shares, H, distances) float32: score gradients summed over the (batch, segment) units of a share.

    Column ``c`` is the distance of ``c - (rows - 1)`` selected rows, ``rate`` tokens each.
    """
    M: tl.constexpr = C.M
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    head, part = rest % heads, rest // heads
    q_head, kv_head = tl.cast(head, tl.int64), tl.cast(head // group, tl.int64)
    offset = head_offset(head, rate, heads, C.BLOCKED)
    lowest = block * M - (rows - 1)
    m, n, d = tl.arange(0, M), tl.arange(0, 2 * M), tl.arange(0, C.D_BLOCK)
    d_ok = d < C.D
    scale2 = scale * LOG2E
    apart = lowest + n[None, :] - m[:, None]
    bias_only = extras_of(PADDING, BIAS, padding_at, bias_at, 0, q_head)
    bias = bias_of(bias_only, apart * rate, (apart < rows) & (apart > -rows))
    total = tl.zeros([M, 2 * M], tl.float32)
    for unit in tl.range(part * share, tl.minimum(units, (part + 1) * share)):
        batch = tl.cast(unit // segments, tl.int64)
        start = unit % segments * segment_length
        count = tl.cdiv(tl.maximum(tl.minimum(segment_length, length - start) - offset, 0), rate)
        # Queries whose key at some distance of the block lies in the segment.
        for first in tl.range(tl.maximum(0, 1 - M - lowest), tl.minimum(count, count - lowest), M, num_stages=1):
            q_index, k_index = first + m, first + lowest + n
            q_ok = q_index < count
            k_ok = (k_index >= 0) & (k_index < count)
            row = tl.cast(start + offset, tl.int64) + tl.cast(q_index, tl.int64) * rate
            key = tl.cast(start + offset, tl.int64) + tl.cast(k_index, tl.int64) * rate
            if C.PADDED:
                extras = extras_of(PADDING, BIAS, padding_at, bias_at, batch, q_head)
                k_ok = k_ok & (padding_of(extras, key, k_ok, True) == 0)
            q_loaded, k_loaded = q_ok[:, None] & d_ok[None, :], k_ok[:, None] & d_ok[None, :]
            q_rows, grad_rows = head_rows(Q, q_at, batch, q_head), head_rows(GRAD_OUT, grad_at, batch, q_head)
            k_rows, v_rows = head_rows(K, k_at, batch, kv_head), head_rows(V, v_at, batch, kv_head)
            q = tl.load(q_rows + row[:, None] * q_at[2] + d[None, :], mask=q_loaded, other=0.0)
            k = tl.load(k_rows + key[:, None] * k_at[2] + d[None, :], mask=k_loaded, other=0.0)
            v = tl.load(v_rows + key[:, None] * v_at[2] + d[None, :], mask=k_loaded, other=0.0)
            grad = tl.load(grad_rows + row[:, None] * grad_at[2] + d[None, :], mask=q_loaded, other=0.0)
            at = batch * lse_at[0] + q_head * lse_at[1] + row * lse_at[2]
            lse = tl.load(LSE + at, mask=q_ok, other=float("-inf"))
            # A row without keys, or a dead one, whose query may be anything, has lse -inf and probabilities 0.
            some = lse != float("-inf")
            lse2 = tl.where(some, lse, float("inf")) * LOG2E
            delta = tl.load(DELTA + at, mask=q_ok, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision=C.PRECISION) * scale2 + bias
            p = tl.where(some[:, None] & k_ok[None, :], tl.exp2(s - lse2[:, None]), 0.0)
            total += p * (tl.dot(grad, tl.trans(v), input_precision=C.PRECISION) - delta[:, None])
    # Row m of a tile has the block's first distance in its column m.
    t = tl.arange(0, M)
    by_distance = tl.sum(tl.gather(total, m[:, None] + t[None, :], 1), 0)
    column = block * M + t
    at_head = tl.cast(part * heads + head, tl.int64) * distances
    tl.store(PARTS + at_head + column, by_distance, mask=column < distances)
