"""``stream_attention``: check the next tokens of a stream, attend, count them."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from longnet.attention.call import check_mask, check_scale, check_tensor, refuse_tracing
from longnet.attention.padding import warn_moved_rows
from longnet.attention.streaming.band_chunk import attend_band_chunk
from longnet.attention.streaming.band_fused import fused_band_step
from longnet.attention.streaming.band_step import band_step
from longnet.attention.streaming.cache import DilatedCache
from longnet.attention.streaming.chunk import attend_chunk
from longnet.attention.streaming.fused import fits, fused_step
from longnet.attention.streaming.step import step
from longnet.checks import check_flags
from longnet.runtime.autocast import autocast_dtype, no_autocast
from longnet.runtime.torch_internals import has_tangents, is_transformed


@overload
def stream_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: DilatedCache,
    *,
    scale: float | None = ...,
    key_padding_mask: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def stream_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: DilatedCache,
    *,
    scale: float | None = ...,
    key_padding_mask: Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def stream_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: DilatedCache,
    *,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the next T tokens of a causal stream, exact; then the cache holds what later tokens can reach.

    The rows are those that one causal :func:`longnet.dilated_attention` call over everything read so far would give for these
    tokens (LongNet, arXiv 2307.02486, sections 2.2 to 2.4), however the stream is cut into chunks. Time and extra memory
    follow the chunk's own attention, T queries to at most w / r keys in a branch (w, r), never what was read before; to
    the cached N / r in a segment without end.
    Chunks that start at multiples of the dilation rates and end at segment ends (or lie inside one segment) are fastest.

    Args:
        query: (B, H, T, D), T >= 1, of the cache's dtype, any strides. Under autocast it is cast as
            ``F.scaled_dot_product_attention`` casts.
        key: (B, Hk, T, D), with B, H, Hk and D those of the cache.
        value: (B, Hk, T, D).
        cache: of the pattern; written to.
        scale: of the scores, any finite number; default ``D ** -0.5``.
        key_padding_mask: (B, T) bool, True where a token is to be ignored as a key, now and later. Padding counts as
            positions, and stands before a row's first real token only: a stream is padded on the left.

        return_lse: also return the natural log of the softmax denominators.

    Returns:
        out (B, H, T, D) in the query's dtype and layout; with ``return_lse`` also lse (B, H, T), float32 (float64 for
        float64). A row without any key has out 0 and lse -inf.

    Raises:
        TypeError: an argument of the wrong type. ValueError: any other bad value, gradients among them: a cache holds
            no graph. RuntimeError: inside of torch.jit.trace, torch.func or forward-mode AD. The cache is then as it was.
            After any other exception it is as it was, or refuses the next call.
    """
    _check_transforms(query, key, value)
    query, key, value = _check_tensors(query, key, value, cache)
    scale = check_scale(scale, cache.head_dim, cache.dtype)
    check_flags(return_lse=return_lse)
    with torch.no_grad(), no_autocast(query):
        if key_padding_mask is None:
            cache._make_room(query.shape[2])
            return _read(query, key, value, cache, scale, return_lse)
        padding, most = _check_mask(key_padding_mask, query, cache)
        cache._make_room(query.shape[2])
        before = cache.padding.clone(), cache._most_padding
        try:
            cache._set_padding(padding, most)
            return _read(query, key, value, cache, scale, return_lse)
        except BaseException:
            # Memory may run out, say: the tokens have not been read then, and neither has their padding.
            cache._set_padding(*before)
            raise


def stream_attention_warned(query: Tensor, key: Tensor, value: Tensor, cache: DilatedCache, **options: Any) -> Tensor:
    """:func:`stream_attention`, and a warning where padding on the left has moved a row's segments."""
    before = cache._most_padding
    out = stream_attention(query, key, value, cache, **options)
    if cache._most_padding > before and not cache._by_row:
        warn_moved_rows(((count, None) for count in cache.padding.tolist()), cache.pattern)
    return out


def _read(
    query: Tensor, key: Tensor, value: Tensor, cache: DilatedCache, scale: float, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    single, on_host = query.shape[2] == 1, query.device.type == "cpu"
    if single and not (on_host and cache._is_paper):
        # A GPU waits for launches, so few operations that touch rows in vain are better there; the CPU waits for bytes.
        out, lse = _step(query, key, value, cache, scale, return_lse)
    else:
        out, lse = (attend_chunk if cache._is_paper else attend_band_chunk)(query, key, value, cache, scale)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _step(
    query: Tensor, key: Tensor, value: Tensor, cache: DilatedCache, scale: float, return_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    lse: Tensor | None
    by_kernels = fits(cache)
    with cache._writing():
        if not cache._is_paper:
            out, lse = (fused_band_step if by_kernels else band_step)(query, key, value, cache, scale)
        elif by_kernels and not return_lse:
            out, lse = fused_step(query, key, value, cache, scale), None
        else:
            out, lse = step(query, key, value, cache, scale)
        cache.moved(1, on_device=False)
    return out, lse


def _check_transforms(*tensors: Tensor) -> None:
    """A cache is written to: it can hold neither a transform's tensors nor tangents."""
    refuse_tracing()
    if torch.compiler.is_compiling():
        return
    tangents = has_tangents() and any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    )
    if tangents or is_transformed():
        raise RuntimeError(
            "stream_attention writes to its cache, so torch.func and forward-mode AD cannot transform it: expected "
            "longnet.dilated_attention over the whole sequence"
        )


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, cache: DilatedCache) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(cache, DilatedCache):
        raise TypeError(f"cache has type {type(cache).__name__}: expected a longnet.DilatedCache")
    cache._check_whole()
    tensors = {"query": query, "key": key, "value": value}
    for name, x in tensors.items():
        check_tensor(name, x, "(B, H, T, D)", f"the cache's {cache.dtype}")
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                f"{name} requires a gradient and a cache holds no graph: call under torch.no_grad() or "
                "torch.inference_mode(), or train with longnet.dilated_attention"
            )
    length = query.shape[2]
    if length < 1:
        raise ValueError(f"query has shape {tuple(query.shape)}: expected T >= 1 tokens, got none")
    for name, x in tensors.items():
        heads = cache.heads if name == "query" else cache.kv_heads
        expected = (cache.batch_size, heads, length, cache.head_dim)
        if tuple(x.shape) != expected:
            said = "(B, H, T, D)" if name == "query" else "(B, Hk, T, D)"
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {said} = {expected} by the cache")
        if x.device != cache.device:
            raise ValueError(f"{name} is on {x.device}: expected the cache's device {cache.device}")
        tensors[name] = x = _autocast(x)
        if x.dtype != cache.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}: expected the cache's {cache.dtype}")
    return tensors["query"], tensors["key"], tensors["value"]


def _autocast(x: Tensor) -> Tensor:
    dtype = autocast_dtype(x.device.type)
    return x if x.dtype == torch.float64 or dtype is None else x.to(dtype)


def _check_mask(mask: Tensor, query: Tensor, cache: DilatedCache) -> tuple[Tensor, int]:
    """Where each row's first real token stands once this chunk has been read, and the largest of these."""
    check_mask(mask, query, "(B, T)")
    started = cache.padding < cache.position  # (B,) a real token has been read
    real = (~mask).cumsum(1) > 0  # (B, T) ... or stands here or before
    holes = (mask & (real | started[:, None])).nonzero()
    if len(holes):
        row, token = holes[0].tolist()
        raise ValueError(
            f"key_padding_mask[{row}, {token}] is True after a real token of that row: a stream takes padding before a row's "
            "first real token only, expected left-padded rows"
        )
    padding = torch.where(started, cache.padding, cache.position + (~real).sum(1))
    return padding, int(padding.max())
