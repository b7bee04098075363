"""Queries and keys of a single token, rotated and scaled in one launch: by tensor operations it takes fifty."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotate_token_kernel(
    Q, K, Q_OUT, K_OUT, POSITION, OFFSETS, q_at, k_at, q_out_at, k_out_at, heads, kv_heads, base, scale_base, centre, period,
    D: tl.constexpr, PAIRS: tl.constexpr, SCALED: tl.constexpr, REPEATS: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """One head of the queries or keys of a batch row. What ``XPos.tables`` and ``rotate`` compute.

    ``base``, ``scale_base`` and ``centre`` are the bits of float64 numbers: Triton rounds the numbers of a launch to float32.
    """
    program = tl.program_id(0)
    head = program % (heads + kv_heads)
    batch = tl.cast(program // (heads + kv_heads), tl.int64)
    number = tl.arange(0, PAIRS)
    ok = number < D // 2
    position = tl.load(POSITION)
    pair = (2 * number).to(tl.float64) / D
    angle = position.to(tl.float64) * tl.exp(-pair * tl.log(_float64(base)))
    cos, sin = tl.cos(angle), tl.sin(angle)
    of_keys = head >= heads
    if SCALED:
        local = position
        if REPEATS:
            if BY_ROW:
                local += tl.load(OFFSETS + batch)
            # As in Python, below 0 too.
            local = (local % period + period) % period
        # log((pair + 0.4) / 1.4) in whole numbers, which float32 holds.
        exponent = (local.to(tl.float64) - _float64(centre)) / _float64(scale_base) * tl.log((5 * pair + 2) / 7)
        scale = tl.exp(tl.where(of_keys, -exponent, exponent))
        cos, sin = cos * scale, sin * scale
    cos, sin = cos.to(tl.float32), sin.to(tl.float32)
    x, out, at, out_at = Q, Q_OUT, batch * q_at[0] + head * q_at[1], batch * q_out_at[0] + head * q_out_at[1]
    if of_keys:
        head -= heads
        x, out, at, out_at = K, K_OUT, batch * k_at[0] + head * k_at[1], batch * k_out_at[0] + head * k_out_at[1]
    even = tl.load(x + at + 2 * number, mask=ok, other=0.0).to(tl.float32)
    odd = tl.load(x + at + 2 * number + 1, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + out_at + 2 * number, (even * cos - odd * sin).to(out.dtype.element_ty), mask=ok)
    tl.store(out + out_at + 2 * number + 1, (odd * cos + even * sin).to(out.dtype.element_ty), mask=ok)


@triton.jit
def _float64(bits):
    return tl.cast(tl.cast(bits, tl.int64), tl.float64, bitcast=True)
