"""The forward kernel: one online softmax over every branch of a nest, keys and values read where they lie."""

from __future__ import annotations

import triton
import triton.language as tl

from longnet.attention.backends.triton.kernels.rows import (
    LOG2E,
    accumulator,
    bias_of,
    exponentials,
    extras_of,
    head_rows,
    heads_of,
    key_tiles,
    load_tile,
    locate,
    mixed,
    own_rows,
    padding_of,
    range_weights,
    ranges_of,
)

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    q, tiles, j, row_max, row_sum, acc, weights, scale2, row, row_ok, d_ok, extras, CUT: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """(row max, row sum, acc) after one more block of keys, from ``j`` on; ``CUT`` where some row may not see all of it."""
    n, at = tl.arange(0, C.N), tl.cast(j, tl.int64)
    inside = (j + n) < tiles.keys.count
    key = tiles.keys.first + (j + n) * tiles.keys.step
    k = load_tile(tiles.k + at * tiles.k_step, inside, d_ok, CUT, C)
    s = tl.dot(q, tl.trans(k), input_precision=C.PRECISION)
    if C.BIASED:
        s *= scale2
        s += bias_of(extras, key[None, :] - row[:, None], row_ok[:, None] & inside[None, :] if CUT else row_ok[:, None])
    if C.PADDED:
        gone = padding_of(extras, key, inside, CUT) != 0
    if CUT:
        seen = n[None, :] <= (tiles.last - j)[:, None]
        if C.PADDED:
            seen = seen & (~gone)[None, :]
        s = tl.where(seen, s, float("-inf"))
    elif C.PADDED:
        s = tl.where(gone[None, :], float("-inf"), s)
    if C.BIASED:
        new = tl.maximum(row_max, tl.max(s, 1))
    else:
        new = tl.maximum(row_max, tl.max(s, 1) * scale2)
        s = s * scale2
    base = new
    if CUT or C.PADDED or C.BIASED:
        # A row that has seen no key yet subtracts 0: exp2(-inf - -inf) would be NaN.
        base = tl.where(new == float("-inf"), 0.0, new)
    p = exponentials(s, base, weights, C)
    rescale = tl.exp2(row_max - base)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    acc = acc * rescale[:, None]
    v = load_tile(tiles.v + at * tiles.v_step, inside, d_ok, CUT, C)
    if C.PADDED:
        # Whatever a padded value holds (a NaN, say) must not reach 0 * value.
        v = tl.where(gone[:, None], 0.0, v)
    return new, row_sum, tl.dot(p.to(v.dtype), v, acc, input_precision=C.PRECISION)


@triton.jit
def forward_kernel(
    Q, K, V, OUT, LSE, PADDING, BIAS, OFFSETS, q_at, k_at, v_at, out_at, lse_at, padding_at, bias_at, sizes, nest, C: tl.constexpr
):  # fmt: skip
    """``M`` query rows of one class: out and lse, mixed into what earlier nests left if ``MERGE``."""
    M: tl.constexpr = C.M
    block = locate(OFFSETS, sizes, nest, M, C.CAUSAL, C)
    if block.first_row >= block.count:
        return
    batch, q_head, kv_head = heads_of(block, sizes)
    d, row, d_ok, row_ok, stored = own_rows(block, M, C)
    row_wide = row.to(tl.int64)[:, None]
    q = tl.load(head_rows(Q, q_at, batch, q_head) + row_wide * q_at[2] + d[None, :], mask=stored, other=0.0)
    k_rows = head_rows(K, k_at, batch, kv_head) + d[None, :]
    v_rows = head_rows(V, v_at, batch, kv_head) + d[None, :]
    extras = extras_of(PADDING, BIAS, padding_at, bias_at, batch, q_head)
    scale2 = sizes.scale * LOG2E
    row_max = tl.full([M], float("-inf"), tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    acc = accumulator(M, C.D_BLOCK)

    for index in tl.range(0, ranges_of(block, C)):
        tiles, whole = key_tiles(index, k_rows, v_rows, k_at, v_at, block, row, sizes, nest, C)
        weights = range_weights(tiles.keys, block, sizes, nest, C)
        # Key blocks that every row sees whole, then the ones that the diagonal or the end cuts.
        for j in tl.range(0, whole, C.N, num_stages=C.STAGES):
            row_max, row_sum, acc = _attend(
                q, tiles, j, row_max, row_sum, acc, weights, scale2, row, row_ok, d_ok, extras, False, C
            )
        for j in tl.range(whole, tiles.keys.count, C.N, num_stages=C.STAGES):
            row_max, row_sum, acc = _attend(
                q, tiles, j, row_max, row_sum, acc, weights, scale2, row, row_ok, d_ok, extras, True, C
            )

    # Not "greater": the sum of a query that is NaN is NaN, and so is its lse.
    some = row_sum != 0.0
    out = acc / tl.where(some, row_sum, 1.0)[:, None]
    lse = tl.where(some, row_max * LN2 + tl.log(tl.where(some, row_sum, 1.0)), float("-inf"))
    out_rows = head_rows(OUT, out_at, batch, q_head) + row_wide * out_at[2] + d[None, :]
    lse_rows = head_rows(LSE, lse_at, batch, q_head) + row.to(tl.int64) * lse_at[2]
    if C.MERGE:
        out, lse = mixed(out, lse, out_rows, lse_rows, row_ok, stored)
    tl.store(out_rows, out.to(OUT.dtype.element_ty), mask=stored)
    tl.store(lse_rows, lse, mask=row_ok)
