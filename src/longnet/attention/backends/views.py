"""Rows of a tile as strided views, columns of a bias, and heads that share keys."""

from __future__ import annotations

import torch
from torch import Tensor

from longnet.geometry import Tile


def tile_view(x: Tensor, tile: Tile) -> Tensor:
    """The tile's rows of x (B, H, N, ...) as a view (B, segments, offsets, heads, rows, ...), no copy."""
    batch, head, token, *rest = x.stride()
    return x.as_strided(
        (x.shape[0], *tile.shape, *x.shape[3:]),
        (batch, *tile.strides(head, token), *rest),
        x.storage_offset() + tile.origin(head, token),
    )


def padding_view(padding: Tensor, tile: Tile) -> Tensor:
    """The tile's entries of a (B, N) mask as a view (B, segments, offsets, 1, rows): all heads share them."""
    batch, token = padding.stride()
    segment, offset, _, row = tile.strides(0, token)
    segments, offsets, _, rows = tile.shape
    return padding.as_strided(
        (padding.shape[0], segments, offsets, 1, rows),
        (batch, segment, offset, 0, row),
        padding.storage_offset() + tile.origin(0, token),
    )


def bias_columns(bias: Tensor, queries: int, keys: int, step: int, between: int = 0) -> slice:
    """The columns of a bias (..., 2L - 1) at the distances from any of ``queries`` rows to any of ``keys`` rows, rising.

    Args:
        step: tokens from row to row.
        between: tokens from the first query to the first key.
    """
    lowest = bias.shape[-1] // 2 + between - (queries - 1) * step
    return slice(lowest, lowest + (queries + keys - 2) * step + 1, step)


def rows_without_keys(padded: Tensor, is_causal: bool) -> Tensor:
    """Which rows of (..., rows) see no key at all when ``padded`` keys are left out."""
    if is_causal:
        return padded.to(torch.int32).cumprod(-1).bool()
    return padded.all(-1, keepdim=True).expand_as(padded)


def signed(x: Tensor, scale: float) -> Tensor:
    """x times the sign of the scale: a kernel that needs a scale above 0 gets the sign with the query."""
    return x if scale > 0 else -x if scale < 0 else torch.zeros_like(x)


def repeat_heads(x: Tensor, group: int) -> Tensor:
    """(B, Hk, N, D) to (B, Hk * group, N, D): the key/value head that each query head reads."""
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def sum_heads(grad: Tensor, group: int) -> Tensor:
    """The transpose of :func:`repeat_heads`: gradients of the query heads that share a key/value head, added up."""
    return grad if group == 1 else grad.unflatten(1, (-1, group)).sum(2)
