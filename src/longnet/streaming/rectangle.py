"""Queries against cached rows: every query sees every row, no causal diagonal. The one place for faster kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from longnet import mixing
from longnet.call import lse_dtype

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

# How many scores the matrix products hold at a time: 64 MiB in float32.
_SCORES = 1 << 24


def rectangle_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, padded: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of T queries to n keys each, none masked but the padded ones.

    Args:
        query: (B, Hk * share, T, D), T >= 1; ``share`` neighbouring heads read one key/value head.
        key: (B, Hk, n, D), n >= 1.
        value: (B, Hk, n, D).
        padded: (B, n) bool, True where a key is to be ignored, or None.

    Returns:
        out (B, Hk * share, T, D) in the query's dtype (or that of the lse) and lse (B, Hk * share, T), float32 or float64.
        A query whose keys are all padded has out 0 and lse -inf.
    """
    batch, heads, count, dim = query.shape
    # Without a diagonal it does not matter which query a row is: heads that share keys become more rows.
    rows = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    if padded is not None:
        # Whatever a padded value holds (a NaN, say) must not reach 0 * value.
        key, value = (x.masked_fill(padded[:, None, :, None], 0.0) for x in (key, value))
    compute = _by_cpu_flash if query.device.type == "cpu" else _by_products
    out, lse = compute(rows, key, value, scale, padded)
    return out.reshape(batch, heads, count, dim), lse.reshape(batch, heads, count)


def _by_cpu_flash(
    query: Tensor, key: Tensor, value: Tensor, scale: float, padded: Tensor | None
) -> tuple[Tensor, Tensor]:
    # A last stride other than 1 gives wrong numbers silently.
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    mask = None
    if padded is not None:
        bias = torch.zeros_like(padded, dtype=query.dtype).masked_fill_(padded, -torch.inf)
        mask = bias[:, None, None, :].expand(-1, query.shape[1], -1, -1)
    out, lse = _flash(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
    if padded is not None:
        # The kernel says 0 for a row without keys.
        lse = lse.masked_fill(padded.all(-1)[:, None, None], -torch.inf)
    return out, lse


def _by_products(
    query: Tensor, key: Tensor, value: Tensor, scale: float, padded: Tensor | None
) -> tuple[Tensor, Tensor]:
    kind = lse_dtype(query.dtype)
    key, value = key.to(kind).transpose(-1, -2), value.to(kind)
    step = max(1, _SCORES // (query.shape[0] * query.shape[1] * key.shape[-1]))
    outs, lses = [], []
    for part in query.split(step, dim=2):
        scores = (part.to(kind) * scale) @ key
        if padded is not None:
            scores.masked_fill_(padded[:, None, None, :], -torch.inf)
        lse = scores.logsumexp(-1)
        outs.append(scores.sub_(mixing.lse_for_backward(lse).unsqueeze(-1)).exp_() @ value)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)
