"""Kernels of :mod:`longnet.nn`.

Of a norm, with GELU or without, a launch is persistent: every program has weights, and in the backward pass sums of their
gradients, in registers, and takes one row after the other, of which the next is on its way. A row of C channels is ``PARTS``
of ``WIDTH``, a power of two, so that no lane is idle at C = 768 or 3,072. A BIAS of None means RMS norm, which has none, and
no mean.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _normal(x):
    """(the normal distribution's cumulative function, ``exp(-x^2 / 2)``) of x, the first to 7.5e-8.

    Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 7.1.26: both share one exponential, where the library's
    error function takes a branch and many more instructions.
    """
    bell = tl.exp2(x * x * (-0.5 * LOG2E))
    t = 1.0 / (1.0 + 0.23164189 * tl.abs(x))
    tail = (
        t * (0.5 * bell) * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    )
    return tl.where(x < 0.0, tail, 1.0 - tail), bell


@triton.jit
def _row(POINTER, row, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """The parts of a row."""
    at = POINTER + tl.cast(row, tl.int64) * (PARTS * WIDTH) + tl.arange(0, WIDTH)
    found = ()
    for part in tl.static_range(PARTS):
        found = found + (tl.load(at + part * WIDTH),)
    return found


@triton.jit
def _each(POINTERS, row, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """The parts of a row of each of several tensors, one tensor after the other."""
    found = ()
    for which in tl.static_range(len(POINTERS)):
        found = found + _row(POINTERS[which], row, PARTS, WIDTH)
    return found


@triton.jit
def _add(a, b, c, d):
    return a + c, b + d


@triton.jit
def _statistics(parts, eps, CENTRED: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """(mean, 1 / deviation) of a row, or (0, 1 / root of the mean square)."""
    mean = 0.0
    if CENTRED:
        total = tl.zeros([WIDTH], tl.float32)
        for part in tl.static_range(PARTS):
            total += parts[part]
        mean = tl.sum(total, 0) / (PARTS * WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for part in tl.static_range(PARTS):
        total += (parts[part] - mean) * (parts[part] - mean)
    return mean, tl.rsqrt(tl.sum(total, 0) / (PARTS * WIDTH) + eps)


@triton.jit
def _affine(y, weight, bias, part: tl.constexpr, CENTRED: tl.constexpr):
    """A part of a row times its weight, and plus its bias where there is one."""
    y = y * weight[part].to(tl.float32)
    if CENTRED:
        y += bias[part].to(tl.float32)
    return y


@triton.jit
def _bias_row(BIAS, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    if BIAS is not None:
        return _row(BIAS, 0, PARTS, WIDTH)
    else:
        return ()


@triton.jit
def norm_forward_kernel(
    X, WEIGHT, BIAS, OUT, rows, eps, GELU: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """OUT = norm of X, or of its GELU, (rows, PARTS * WIDTH) each."""
    weight, bias = _row(WEIGHT, 0, PARTS, WIDTH), _bias_row(BIAS, PARTS, WIDTH)
    upcoming = _row(X, tl.program_id(0), PARTS, WIDTH)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        here = upcoming
        # Past the end any.
        upcoming = _row(X, tl.minimum(row + tl.num_programs(0), rows - 1), PARTS, WIDTH)
        hidden = ()
        for part in tl.static_range(PARTS):
            x = here[part].to(tl.float32)
            if GELU:
                share, _ = _normal(x)
                x = x * share
            hidden = hidden + (x,)
        mean, scale = _statistics(hidden, eps, BIAS is not None, PARTS, WIDTH)
        at = OUT + tl.cast(row, tl.int64) * (PARTS * WIDTH) + tl.arange(0, WIDTH)
        for part in tl.static_range(PARTS):
            y = _affine((hidden[part] - mean) * scale, weight, bias, part, BIAS is not None)
            tl.store(at + part * WIDTH, y.to(OUT.dtype.element_ty))


@triton.jit
def few_rows_kernel(
    X, WEIGHT, BIAS, MATRICES, BIASES, OUTS, rows, eps, columns,
    GELU: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """OUTS = norm of X (or of its GELU) times each of MATRICES, transposed, plus BIASES: for a few rows.

    A program has ``COLUMNS`` rows of one matrix, ``columns[which]`` in all, in registers, and takes the norm again.
    """
    program = tl.program_id(0)
    for which in tl.static_range(len(MATRICES)):
        blocks = tl.cdiv(columns[which], COLUMNS)
        if (program >= 0) & (program < blocks):
            column = program * COLUMNS + tl.arange(0, COLUMNS)
            there = column < columns[which]
            at = MATRICES[which] + column.to(tl.int64)[:, None] * (PARTS * WIDTH) + tl.arange(0, WIDTH)[None, :]
            matrix = ()
            for part in tl.static_range(PARTS):
                matrix = matrix + (tl.load(at + part * WIDTH, mask=there[:, None], other=0.0),)
            weight, bias = _row(WEIGHT, 0, PARTS, WIDTH), _bias_row(BIAS, PARTS, WIDTH)
            for row in range(rows):
                here = _row(X, row, PARTS, WIDTH)
                hidden = ()
                for part in tl.static_range(PARTS):
                    x = here[part].to(tl.float32)
                    if GELU:
                        share, _ = _normal(x)
                        x = x * share
                    hidden = hidden + (x,)
                mean, scale = _statistics(hidden, eps, BIAS is not None, PARTS, WIDTH)
                products = tl.zeros([COLUMNS, WIDTH], tl.float32)
                for part in tl.static_range(PARTS):
                    y = _affine((hidden[part] - mean) * scale, weight, bias, part, BIAS is not None)
                    # Rounded as what a product of many rows reads.
                    y = y.to(OUTS[which].dtype.element_ty).to(tl.float32)
                    products += matrix[part].to(tl.float32) * y[None, :]
                out = tl.sum(products, 1)
                if len(BIASES) > 0:
                    out += tl.load(BIASES[which] + column, mask=there, other=0.0).to(tl.float32)
                to = OUTS[which] + tl.cast(row, tl.int64) * columns[which] + column
                tl.store(to, out.to(OUTS[which].dtype.element_ty), mask=there)
        program -= blocks


@triton.jit
def norm_backward_kernel(
    GRADS, X, WEIGHT, BIAS, BESIDE, GRAD_X, NORMED, SUMS, rows, eps,
    GELU: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """GRAD_X of the norm of X, or of its GELU, (rows, PARTS * WIDTH), from the sum of GRADS; NORMED is the norm again.

    BESIDE is None or what else there is of the gradient of X. This program's rows' part of the gradients of weight and bias goes
    into SUMS (2, programs, PARTS * WIDTH), or (1, ...) without a bias.
    """
    C: tl.constexpr = PARTS * WIDTH
    weight_sum, bias_sum = (), ()
    for _ in tl.static_range(PARTS):
        weight_sum = weight_sum + (tl.zeros([WIDTH], tl.float32),)
        bias_sum = bias_sum + (tl.zeros([WIDTH], tl.float32),)
    next_x, next_grads = _row(X, tl.program_id(0), PARTS, WIDTH), _each(GRADS, tl.program_id(0), PARTS, WIDTH)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        x_row, grad_rows = next_x, next_grads
        if BESIDE is not None:
            beside = _row(BESIDE, row, PARTS, WIDTH)
        # Past the end any.
        following = tl.minimum(row + tl.num_programs(0), rows - 1)
        next_x, next_grads = _row(X, following, PARTS, WIDTH), _each(GRADS, following, PARTS, WIDTH)
        # From the nearest cache: registers are for what comes from memory.
        weight, bias = _row(WEIGHT, 0, PARTS, WIDTH), _bias_row(BIAS, PARTS, WIDTH)
        hidden, slopes = (), ()
        for part in tl.static_range(PARTS):
            x = x_row[part].to(tl.float32)
            if GELU:
                share, bell = _normal(x)
                slopes = slopes + (share + x * bell * 0.3989422804014327,)
                x = x * share
            hidden = hidden + (x,)
        mean, scale = _statistics(hidden, eps, BIAS is not None, PARTS, WIDTH)
        at = tl.cast(row, tl.int64) * C + tl.arange(0, WIDTH)
        normed, grads, weight_new, bias_new = (), (), (), ()
        total, against = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
        for part in tl.static_range(PARTS):
            grad = grad_rows[part].to(tl.float32)
            for other in tl.static_range(1, len(GRADS)):
                grad += grad_rows[other * PARTS + part].to(tl.float32)
            y = (hidden[part] - mean) * scale
            weight_new = weight_new + (weight_sum[part] + grad * y,)
            if BIAS is not None:
                bias_new = bias_new + (bias_sum[part] + grad,)
            else:
                bias_new = bias_new + (bias_sum[part],)
            again = _affine(y, weight, bias, part, BIAS is not None)
            tl.store(NORMED + at + part * WIDTH, again.to(NORMED.dtype.element_ty))
            grad = grad * weight[part].to(tl.float32)
            total += grad
            against += grad * y
            normed = normed + (y,)
            grads = grads + (grad,)
        weight_sum, bias_sum = weight_new, bias_new
        middle, along = tl.reduce((total, against), 0, _add)
        for part in tl.static_range(PARTS):
            grad = grads[part]
            if BIAS is not None:
                grad -= middle / C
            grad = (grad - normed[part] * (along / C)) * scale
            if GELU:
                grad = grad * slopes[part]
            if BESIDE is not None:
                grad += beside[part].to(tl.float32)
            tl.store(GRAD_X + at + part * WIDTH, grad.to(GRAD_X.dtype.element_ty))
    at = SUMS + tl.program_id(0) * C + tl.arange(0, WIDTH)
    for part in tl.static_range(PARTS):
        tl.store(at + part * WIDTH, weight_sum[part])
        if BIAS is not None:
            tl.store(at + tl.num_programs(0) * C + part * WIDTH, bias_sum[part])


@triton.jit
def column_sums_kernel(TENSORS, SUMS, rows, PARTS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """The sum of this program's rows of one of TENSORS (rows, PARTS * WIDTH), into SUMS (tensors, programs, PARTS * WIDTH)."""
    C: tl.constexpr = PARTS * WIDTH
    programs = tl.num_programs(0) // len(TENSORS)
    program = tl.program_id(0) % programs
    for which in tl.static_range(len(TENSORS)):
        if tl.program_id(0) // programs == which:
            columns = TENSORS[which] + tl.arange(0, WIDTH)[None, :]
            sums = ()
            for _ in tl.static_range(PARTS):
                sums = sums + (tl.zeros([ROWS, WIDTH], tl.float32),)
            for start in range(program * ROWS, rows, programs * ROWS):
                row = start + tl.arange(0, ROWS)
                at = columns + row.to(tl.int64)[:, None] * C
                new = ()
                for part in tl.static_range(PARTS):
                    found = tl.load(at + part * WIDTH, mask=(row < rows)[:, None], other=0.0)
                    new = new + (sums[part] + found.to(tl.float32),)
                sums = new
            out = SUMS + tl.program_id(0) * C + tl.arange(0, WIDTH)
            for part in tl.static_range(PARTS):
                tl.store(out + part * WIDTH, tl.sum(sums[part], 0))


@triton.jit
def rescale_kernel(
    OUT, LSE, OTHER, LSE_OUT, length, tiles, heads, out_at, lse_at,
    CHANNELS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``ROWS`` tokens of a head of OUT (B, H, length, CHANNELS), times ``sigmoid(LSE - OTHER)``; LSE_OUT = logaddexp(LSE, OTHER).

    OTHER is (H, length) and LSE_OUT (B, H, length), both contiguous.
    """
    place = (tl.program_id(0) // tiles).to(tl.int64)
    rows = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    inside, wide = rows < length, rows.to(tl.int64)
    batch, head = place // heads, place % heads
    lse = tl.load(LSE + batch * lse_at[0] + head * lse_at[1] + wide * lse_at[2], mask=inside, other=0.0)
    other = tl.load(OTHER + head * length + wide, mask=inside, other=0.0)
    top = tl.maximum(lse, other)
    # A row that neither has reached.
    none = top == float("-inf")
    base = tl.where(none, 0.0, top)
    ours, theirs = tl.exp(lse - base), tl.exp(other - base)
    both = tl.where(none, 1.0, ours + theirs)
    tl.store(LSE_OUT + place * length + wide, tl.where(none, top, base + tl.log(both)), mask=inside)
    share = tl.where(none, 0.0, ours / both)
    channels = tl.arange(0, D)
    at = OUT + batch * out_at[0] + head * out_at[1] + wide[:, None] * out_at[2] + channels[None, :]
    stored = inside[:, None] & (channels < CHANNELS)[None, :]
    out = tl.load(at, mask=stored, other=0.0).to(tl.float32)
    tl.store(at, (out * share[:, None]).to(OUT.dtype.element_ty), mask=stored)


@triton.jit
def keep_kernel(SEED, OUT, groups, threshold, WIDTH: tl.constexpr):
    """Eight bytes of 0 or 1 in each of the ``groups`` of OUT, int64: 1 where sixteen random bits are at least the threshold."""
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    words = tl.randint4x(tl.load(SEED), at)
    kept = tl.zeros([WIDTH], tl.int64)
    for number in tl.static_range(4):
        word = words[number].to(tl.uint32, bitcast=True)
        low, high = (word & 0xFFFF).to(tl.int32), (word >> 16).to(tl.int32)
        kept |= (low >= threshold).to(tl.int64) << (16 * number)
        kept |= (high >= threshold).to(tl.int64) << (16 * number + 8)
    tl.store(OUT + at, kept, mask=at < groups)
