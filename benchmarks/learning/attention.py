"""One layer of a pattern on tensors: FlexAttention over ``[keys, strided keys, ...]``, LongNet's branches by the library.

The bands of a layer are one softmax: the keys of every band lie one after the other, and a mask says which of them a query
reads. A strided band's keys are a head's own rows, so the mask of far text is a triangle and no pair outside is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from benchmarks.learning.patterns import Band, Layer
from longnet.attention.functional import pattern_attention

_DENSE = ((Band(None),), ())


@dataclass(frozen=True)
class Sinks:
    """Learned keys and values that every query reads, (heads, sinks, D) each."""

    key: Tensor
    value: Tensor


def attend(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask | None = None,
    sinks: Sinks | None = None,
) -> Tensor:
    """(B, H, N, D), causal; N is a multiple of every stride times its block.

    Args:
        mask: from :func:`make_mask`.
    """
    if (layer.bands, layer.branches) == _DENSE and sinks is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    parts = []
    if layer.bands:
        with_lse = bool(layer.branches) or sinks is not None
        parts.append(_banded(layer.bands, query, key, value, mask, with_lse))
    if layer.branches:
        parts.append(_dilated(layer, query, key, value, with_lse=bool(parts) or sinks is not None))
    if sinks is not None:
        parts.append(_table(query, sinks.key.to(key.dtype), sinks.value.to(value.dtype)))
    if len(parts) == 1:
        return parts[0][0]
    # The merge of two softmaxes by their denominators; autograd goes through both.
    lse = torch.stack([lse for _, lse in parts])
    weights = lse.softmax(0).nan_to_num()
    return sum((out * weight[..., None]).to(query.dtype) for (out, _), weight in zip(parts, weights, strict=True))


def _dilated(layer: Layer, query: Tensor, key: Tensor, value: Tensor, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    length, shift = query.shape[2], layer.shift
    pattern, absent = layer.pattern(length), None
    assert pattern is not None
    if shift:
        query, key, value = (F.pad(x, (0, 0, shift, 0)) for x in (query, key, value))
        absent = torch.zeros(query.shape[0], shift + length, dtype=torch.bool, device=query.device)
        absent[:, :shift] = True
    options: dict[str, Any] = {"is_causal": True, "key_padding_mask": absent, "return_lse": with_lse}
    if not with_lse:
        out: Any = pattern_attention(query, key, value, pattern, **options)
        return out[:, :, shift:], None
    out, lse = pattern_attention(query, key, value, pattern, **options)
    return out[:, :, shift:], lse[:, :, shift:]


def _banded(
    bands: tuple[Band, ...], query: Tensor, key: Tensor, value: Tensor, mask: BlockMask | None, with_lse: bool
) -> tuple[Tensor, Any]:
    length = query.shape[2]
    key, value = (torch.cat([_rows(x, band) for band in bands], 2) for x in (key, value))
    if query.device.type == "cpu":  # FlexAttention has no backward pass there
        heads, queries, keys = (torch.arange(count) for count in (*query.shape[1:3], key.shape[2]))
        mask_function, _ = mask_of(bands, length, query.device)
        return _table(query, key, value, mask_function(torch.tensor(0), heads[:, None, None], queries[:, None], keys))
    if not with_lse:
        return flex_attention(query, key, value, block_mask=mask), None
    out, more = flex_attention(query, key, value, block_mask=mask, return_aux=AuxRequest(lse=True))
    return out, more.lse


def _table(query: Tensor, key: Tensor, value: Tensor, read: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention from the whole table of scores, in the dtype that autocast says; (out, log of the softmax denominators)."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if read is not None:
        scores = scores.masked_fill(~read, -torch.inf)
    return scores.softmax(-1).nan_to_num().to(value.dtype) @ value, scores.logsumexp(-1)


def _rows(x: Tensor, band: Band) -> Tensor:
    """The rows of (B, H, N, D) that each head selects."""
    if band.stride == 1:
        return x
    blocks = x.unflatten(2, (-1, band.stride, band.block))
    return torch.stack([blocks[:, head, :, head % band.stride] for head in range(x.shape[1])], 1).flatten(2, 3)


def make_mask(layer: Layer, heads: int, length: int, device: torch.device, with_lse: bool = False) -> BlockMask | None:
    """What :func:`attend` needs besides tensors; None where it needs none.

    Args:
        with_lse: whether there are sinks, with which the softmax is merged.
    """
    if device.type == "cpu" or ((layer.bands, layer.branches) == _DENSE and not with_lse) or not layer.bands:
        return None
    function, keys = mask_of(layer.bands, length, device)
    # Compiled, or the whole table of pairs would lie in memory.
    return torch.compile(create_block_mask)(function, None, heads, length, keys, device=device)


def mask_of(bands: tuple[Band, ...], length: int, device: torch.device) -> tuple[Any, int]:
    """(FlexAttention's mask over the keys of all bands, how many keys there are)."""
    starts = [0]
    for band in bands:
        starts.append(starts[-1] + length // band.stride)
    far = [length if band.far is None else band.far for band in bands]

    def mask(batch: Tensor, head: Tensor, query: Tensor, place: Tensor) -> Tensor:
        is_read = place < 0
        for band, start, stop, limit in zip(bands, starts[:-1], starts[1:], far, strict=True):
            at = place - start
            position = (at // band.block * band.stride + head % band.stride) * band.block + at % band.block
            distance = query - position
            inside = (place >= start) & (place < stop) & (distance >= band.near) & (distance < limit) & (distance >= 0)
            if band.heads is not None:
                inside = inside & (head >= band.heads[0]) & (head < band.heads[1])
            is_read = is_read | inside
        return is_read

    return mask, starts[-1]
