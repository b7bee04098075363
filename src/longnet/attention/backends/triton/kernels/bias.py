"""The gradient of the relative bias, by distance, without atomics.

A program owns a head and a block of consecutive distances of one branch. It sweeps query blocks; the keys that these
distances reach form a window as long as two blocks. Score gradients of all its (query, window key) tiles are added up
element by element: a distance is the same diagonal in each of them, so diagonals are summed once, at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longnet.attention.backends.triton.kernels.forward import LOG2E
from longnet.attention.backends.triton.kernels.rows import head_offset


@triton.jit
def bias_kernel(
    Q, K, V, GRAD_OUT, LSE, DELTA, PADDING, BIAS, PARTS,
    q_at, k_at, v_at, grad_at, lse_at, padding_at, bias_at,
    length, heads, group, scale, segment_length, rate, segments, units, share, blocks, rows, distances,
    D: tl.constexpr, D_BLOCK: tl.constexpr, M: tl.constexpr, BLOCKED: tl.constexpr, PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """PARTS (shares, H, distances) float32: score gradients summed over the (batch, segment) units of a share.

    Column ``c`` is the distance of ``c - (rows - 1)`` selected rows, ``rate`` tokens each.
    """
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    head, part = rest % heads, rest // heads
    q_head, kv_head = tl.cast(head, tl.int64), tl.cast(head // group, tl.int64)
    offset = head_offset(head, rate, heads, BLOCKED)
    lowest = block * M - (rows - 1)
    m, n, d = tl.arange(0, M), tl.arange(0, 2 * M), tl.arange(0, D_BLOCK)
    d_ok = d < D
    scale2 = scale * LOG2E
    apart = lowest + n[None, :] - m[:, None]
    bias = LOG2E * tl.load(
        BIAS + q_head * bias_at[0] + (apart * rate + bias_at[1]), mask=(apart < rows) & (apart > -rows), other=0.0
    ).to(tl.float32)
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
            if PADDED:
                k_ok = k_ok & (tl.load(PADDING + batch * padding_at[0] + key * padding_at[1], mask=k_ok, other=1) == 0)
            q_loaded, k_loaded = q_ok[:, None] & d_ok[None, :], k_ok[:, None] & d_ok[None, :]
            q = tl.load(
                Q + batch * q_at[0] + q_head * q_at[1] + row[:, None] * q_at[2] + d[None, :], mask=q_loaded, other=0.0
            )
            k = tl.load(
                K + batch * k_at[0] + kv_head * k_at[1] + key[:, None] * k_at[2] + d[None, :], mask=k_loaded, other=0.0
            )
            v = tl.load(
                V + batch * v_at[0] + kv_head * v_at[1] + key[:, None] * v_at[2] + d[None, :], mask=k_loaded, other=0.0
            )
            grad = tl.load(
                GRAD_OUT + batch * grad_at[0] + q_head * grad_at[1] + row[:, None] * grad_at[2] + d[None, :],
                mask=q_loaded, other=0.0,
            )  # fmt: skip
            at = batch * lse_at[0] + q_head * lse_at[1] + row * lse_at[2]
            lse = tl.load(LSE + at, mask=q_ok, other=float("-inf"))
            # A row without keys, or a dead one, whose query may be anything, has lse -inf and probabilities 0.
            some = lse != float("-inf")
            lse2 = tl.where(some, lse, float("inf")) * LOG2E
            delta = tl.load(DELTA + at, mask=q_ok, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2 + bias
            p = tl.where(some[:, None] & k_ok[None, :], tl.exp2(s - lse2[:, None]), 0.0)
            total += p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    # Row m of a tile has the block's first distance in its column m.
    t = tl.arange(0, M)
    by_distance = tl.sum(tl.gather(total, m[:, None] + t[None, :], 1), 0)
    column = block * M + t
    at_head = tl.cast(part * heads + head, tl.int64) * distances
    tl.store(PARTS + at_head + column, by_distance, mask=column < distances)
