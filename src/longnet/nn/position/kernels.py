"""Queries and keys rotated and scaled in one launch: by tensor operations it takes fifty."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotate_kernel(
    Q, K, Q_OUT, K_OUT, COUNTER, OFFSETS, q_at, k_at, q_out_at, k_out_at,
    start, tokens, blocks, parts, heads, kv_heads, base, scale_base, centre, period,
    D: tl.constexpr, PAIRS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, COUNTED: tl.constexpr,
    SCALED: tl.constexpr, REPEATS: tl.constexpr, BY_ROW: tl.constexpr, BACK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """``HEADS`` heads, the queries' and then the keys', of a block of tokens. What ``XPos.tables`` and ``rotate`` compute.

    ``BACK`` rotates the other way and scales alike: the gradients of what was rotated. Without ``EXACT``, for tensors of half
    precision, only angles and exponents are float64, and functions of them are right to 1e-5: those of float64 take longer than
    memory does.

    ``base``, ``scale_base`` and ``centre`` are the bits of float64 numbers: Triton rounds the numbers of a launch to float32.
    """
    program = tl.program_id(0)
    part = program % parts
    block = program // parts % blocks
    batch = tl.cast(program // (parts * blocks), tl.int64)
    token = tl.cast(block, tl.int64) * TOKENS + tl.arange(0, TOKENS)
    position = token + start
    if COUNTED:
        position += tl.load(COUNTER)
    pair = (2 * tl.arange(0, PAIRS)).to(tl.float64) / D
    frequency = tl.exp(-pair * tl.log(_float64(base)))
    angle = position.to(tl.float64)[:, None] * frequency[None, :]
    if not EXACT:
        turns = angle * 0.15915494309189535
        angle = ((turns - tl.floor(turns + 0.5)) * 6.283185307179586).to(tl.float32)
    cos, sin = tl.cos(angle), tl.sin(angle)
    if BACK:
        sin = -sin
    if SCALED:
        local = position
        if REPEATS:
            if BY_ROW:
                local += tl.load(OFFSETS + batch)
            # As in Python, below 0 too.
            local = (local % period + period) % period
        # log((pair + 0.4) / 1.4) in whole numbers, which float32 holds.
        slope = tl.log((5 * pair + 2) / 7) / _float64(scale_base)
        exponent = (local.to(tl.float64) - _float64(centre))[:, None] * slope[None, :]
        if not EXACT:
            exponent = exponent.to(tl.float32)
        q_scale, k_scale = tl.exp(exponent), tl.exp(-exponent)
        q_cos, q_sin = (cos * q_scale).to(tl.float32), (sin * q_scale).to(tl.float32)
        k_cos, k_sin = (cos * k_scale).to(tl.float32), (sin * k_scale).to(tl.float32)
    else:
        q_cos, q_sin = cos.to(tl.float32), sin.to(tl.float32)
        k_cos, k_sin = q_cos, q_sin
    channel = tl.arange(0, 2 * PAIRS)
    ok = (token < tokens)[:, None] & (channel < D)[None, :]
    for number in range(HEADS):
        head = tl.cast(part * HEADS + number, tl.int64)
        if head < heads:
            _rotate(Q, Q_OUT, q_at, q_out_at, batch, head, token, channel, ok, q_cos, q_sin, TOKENS, PAIRS)
        elif head < heads + kv_heads:
            _rotate(K, K_OUT, k_at, k_out_at, batch, head - heads, token, channel, ok, k_cos, k_sin, TOKENS, PAIRS)


@triton.jit
def _rotate(X, OUT, at, out_at, batch, head, token, channel, ok, cos, sin, TOKENS: tl.constexpr, PAIRS: tl.constexpr):
    places = batch * at[0] + head * at[1] + token * at[2]
    x = tl.load(X + places[:, None] + channel[None, :], mask=ok, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, (TOKENS, PAIRS, 2)))
    rotated = tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (TOKENS, 2 * PAIRS))
    out_places = batch * out_at[0] + head * out_at[1] + token * out_at[2]
    tl.store(OUT + out_places[:, None] + channel[None, :], rotated.to(OUT.dtype.element_ty), mask=ok)


@triton.jit
def _float64(bits):
    return tl.cast(tl.cast(bits, tl.int64), tl.float64, bitcast=True)
