"""The module and a model's layer written out densely in float64, with windows, strides, blocks, offset grids, shifted keys."""

from __future__ import annotations

import math
from typing import Any

import torch
from oracle import multiplicity
from torch import Tensor

from longnet import DilatedAttention


def dense_module(
    module: DilatedAttention,
    x: Tensor,
    mask: Tensor | None = None,
    *,
    segment_offset: int | list[int] | None = None,
    scale_base: float | None = None,
) -> Tensor:
    """What ``module(x, mask)`` is, each row by itself and each pair of tokens by its own formula.

    ``scale_base`` is xPos's, None for one that only rotates.
    """
    batch, length, _ = x.shape
    pattern, heads, dim = module.pattern, module.heads, module.head_dim
    options: dict[str, Any] = {
        "window": pattern.window, "dilated_queries": pattern.dilated_queries, "dilation_block": pattern.block,
    }  # fmt: skip
    # Heads that are left when others were pruned select what they selected.
    numbers = range(heads) if pattern.head_numbers is None else pattern.head_numbers.numbers
    total = heads if pattern.head_numbers is None else pattern.head_numbers.total
    options["kv_heads"] = module.kv_heads * total // heads
    given = module.segment_offset if segment_offset is None else segment_offset
    offsets = given if isinstance(given, list) else [given] * batch
    rows = []
    for row, offset in zip(range(batch), offsets, strict=True):
        q, k, v = (proj(x[row]) for proj in (module.q_proj, module.k_proj, module.v_proj))
        q, k, v = (y.unflatten(-1, (-1, dim)).transpose(0, 1) for y in (q, k, v))
        if module.q_norm is not None:
            q, k = module.q_norm(q), module.k_norm(k)
        if module.shift_keys:
            k = k.clone()
            before = k.clone()
            for token in range(length):
                is_first = token == 0 or (mask is not None and bool(mask[row, token - 1]))
                k[:, token, dim // 2 :] = 0.0 if is_first else before[:, token - 1, dim // 2 :]
        k, v = (y.repeat_interleave(heads // module.kv_heads, 0) for y in (k, v))
        scores = _xpos_scores(q, k, scale_base) if module.xpos is not None else q @ k.transpose(-1, -2)
        scores = scores * dim**-0.5
        if module.rel_pos_bias is not None:
            table = module.rel_pos_bias(max(1, length))
            distance = torch.arange(length) - torch.arange(length)[:, None]
            scores = scores + table[:, distance + max(1, length) - 1]
        count = multiplicity(
            pattern.given_lengths, pattern.dilation_rates, total, length, module.causal, pattern.head_offsets,
            segment_offset=offset, **options,
        )[list(numbers)]  # fmt: skip
        if mask is not None:
            count = count.masked_fill(mask[row], 0.0)
        empty = (count == 0).all(-1, keepdim=True)
        scores = (scores + count.clamp(min=1).log()).masked_fill((count == 0) & ~empty, -torch.inf)
        weights = scores.softmax(-1).masked_fill(empty, 0.0)
        rows.append(weights @ v)
    return module._finish(torch.stack(rows), mask)


def _xpos_scores(q: Tensor, k: Tensor, scale_base: float | None) -> Tensor:
    """Scores (H, N, N) of arXiv 2210.12554, one pair of channels after the other."""
    length, dim = q.shape[1:]
    place = torch.arange(length, dtype=torch.float64)
    distance = place[:, None] - place
    scores = torch.zeros(q.shape[0], length, length, dtype=torch.float64)
    for pair in range(dim // 2):
        angle = distance * 10_000.0 ** (-2 * pair / dim)
        decay = torch.ones_like(distance)
        if scale_base is not None:
            decay = torch.exp(distance / scale_base * math.log((2 * pair / dim + 0.4) / 1.4))
        a, b = q[..., 2 * pair], q[..., 2 * pair + 1]
        c, d = k[..., 2 * pair], k[..., 2 * pair + 1]
        same = a[:, :, None] * c[:, None] + b[:, :, None] * d[:, None]
        cross = b[:, :, None] * c[:, None] - a[:, :, None] * d[:, None]
        scores = scores + decay * (same * angle.cos() - cross * angle.sin())
    return scores
