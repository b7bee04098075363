"""What Hugging Face's models say about padding and packed documents, without an N x N mask.

A model makes one mask for all its layers. Ours is a row of numbers, (B, S) int64: 0 where a key is padding, else the number of
the document that the token belongs to, from 1. None is one document without padding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from longnet.attention.padding import leading_padding
from longnet.hf.saving import ENTRY
from longnet.hf.transformers_internals import packs_documents
from longnet.runtime.torch_internals import version_of
from longnet.runtime.tracing import untraced

R = TypeVar("R")

# What position ids said when they were last looked at: looking asks the device, and every layer gets the same tensor.
_seen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# The same for ``cu_seq_lens_q`` or ``seq_idx``: positions in documents.
_positions: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# Masks of caches that keep the last keys alone.
_of_last_keys: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _once(function: Callable[[Tensor], R]) -> Callable[[Tensor], R]:
    """``function`` of a mask, computed once for all layers, which get the same one."""
    results: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    @untraced
    @wraps(function)
    def call(mask: Tensor) -> R:
        if mask not in results:
            results[mask] = function(mask)
        return cast(R, results[mask])

    return call


def document_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    config: Any = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """The mask in our form, for transformers' ``AttentionMaskInterface``.

    Raises:
        ValueError: a mask that dilated attention cannot honour: sliding windows, chunks, blocks, a function of the user's, or
            a static cache.
    """
    # Layers of a model with layer types know their own windows.
    windows = bool((getattr(config, ENTRY, None) or {}).get("types"))
    packed = packs_documents(mask_function, windows=windows)
    if isinstance(q_offset, Tensor) or (kv_offset and not windows) or q_offset + q_length != kv_offset + kv_length:
        raise ValueError(
            f"a cache that holds {kv_length} keys for {q_length} queries at {q_offset}: dilated attention reads caches that "
            "hold what was read and no more; expected longnet.hf.BoundedCache(model) or a DynamicCache"
        )
    padding = None
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.shape[1] < kv_length:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: expected (B, S) with S = {kv_length} keys"
            )
        padding = attention_mask[:, -kv_length:].bool()
        if not torch.compiler.is_exporting() and _all(padding):
            padding = None
    if kv_offset:
        of_last = torch.ones(batch_size, kv_length, device=device) if padding is None else padding
        mask = of_last.long()
        _of_last_keys[mask] = True
        return mask
    # While torch exports, transformers takes positions for packed ones: it cannot look. Ours refuse such positions.
    if not packed or torch.compiler.is_exporting():
        return None if padding is None else padding.long()
    assert mask_function is not None
    rows = torch.arange(batch_size, device=device)[:, None]
    token = torch.arange(1, q_length, device=device)[None]
    return _numbered(~mask_function(rows, torch.zeros_like(rows), token, token - 1), padding)


def documents(mask: Tensor | None, position_ids: Any, length: int, *, has_past: bool) -> Tensor | None:
    """The mask in our form, (B, S), with the documents that the restarts of ``position_ids`` (B or 1, N) begin; none in an
    exported graph.

    transformers looks for them only where there is neither a cache nor an attention mask, and its models make a cache whenever
    nobody says ``use_cache=False``.

    Raises:
        ValueError: documents that begin among tokens which go on with a cache.
    """
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2 or length < 2 or torch.compiler.is_exporting():
        return mask
    if not has_past:
        return _with_restarts(mask, position_ids)
    tail = None if mask is None else mask[:, -length:]
    if _with_restarts(tail, position_ids) is not tail:
        raise ValueError(
            "position_ids start again among tokens that are read into a cache: a cache holds one document a row; expected "
            "packed documents in a forward of their own (use_cache=False), or one document after the other"
        )
    return mask


def positions_of(options: dict[str, Any], batch: int, length: int) -> Tensor | None:
    """Positions (B, N) within the documents that FlashAttention's ``cu_seq_lens_q`` or ``seq_idx`` separate; None for neither.

    Raises:
        ValueError: documents that do not fill the rows of the batch, or other ones for keys than for queries.
    """
    bounds, of_keys, number = (options.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"))
    if bounds is None and of_keys is None and number is None:
        return None
    for x in (bounds, of_keys, number):
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(
                f"cu_seq_lens_q, cu_seq_lens_k or seq_idx is a {type(x).__name__}: expected tensors of integers"
            )
    return _positions_in(bounds, of_keys, number, batch, length)


@untraced
def _positions_in(
    bounds: Tensor | None, of_keys: Tensor | None, number: Tensor | None, batch: int, length: int
) -> Tensor:
    separator = number if bounds is None else bounds
    if separator is None:
        raise ValueError("cu_seq_lens_k without cu_seq_lens_q: expected both, equal")
    version = version_of(separator)
    before = _positions.get(separator)
    if before is not None and before[0] == version and before[1].shape == (batch, length):
        return cast(Tensor, before[1])
    place = torch.arange(batch * length, device=separator.device)
    if bounds is None:
        if separator.shape != (batch, length):
            raise ValueError(f"seq_idx has shape {tuple(separator.shape)}: expected (B, N) = {(batch, length)}")
        starts = torch.ones_like(separator, dtype=torch.bool)
        starts[:, 1:] = separator.diff(dim=1) != 0
        begin = torch.where(starts.flatten(), place, 0).cummax(0).values
    else:
        ends, rows = separator.flatten().tolist(), range(0, batch * length + 1, length)
        if of_keys is not None and of_keys.flatten().tolist() != ends:
            raise ValueError(
                "cu_seq_lens_q and cu_seq_lens_k differ: expected self-attention, documents of as many keys as queries"
            )
        if (
            separator.dim() != 1
            or sorted(ends) != ends
            or not set(rows) <= set(ends)
            or ends[0] != 0
            or ends[-1] != rows[-1]
        ):
            raise ValueError(
                f"cu_seq_lens_q={ends}: expected where documents begin in {batch} rows of {length} tokens, 0 first and "
                f"{batch * length} last, each row the beginning of one"
            )
        begin = separator[torch.searchsorted(separator, place.to(separator.dtype), right=True) - 1]
    positions = (place - begin).view(batch, length)
    if version is not None:
        _positions[separator] = (version, positions)
    return positions


@untraced
def _with_restarts(mask: Tensor | None, position_ids: Tensor) -> Tensor | None:
    # Weak keys must not be held by what they stand for.
    weak, held = (position_ids, None) if mask is None else (mask, position_ids)
    version = version_of(position_ids)
    before = _seen.get(weak)
    if before is not None and before[0] is held and before[1] == version:
        return mask if before[2] is None else before[2]
    restarts = position_ids.diff(dim=1) != 1
    result = mask
    if mask is not None:
        # Positions jump where padding ends too.
        real, changes = mask > 0, mask.diff(dim=1) != 0
        restarts = restarts & real[:, 1:] & real[:, :-1]
        if restarts.any():
            result = _numbered(restarts | (changes & real[:, 1:] & real[:, :-1]), real)
    elif restarts.any():
        result = _numbered(restarts, None)
    if version is not None:
        _seen[weak] = (held, version, None if result is mask else result)
    return result


def is_of_last_keys(mask: Tensor | None) -> bool:
    """Whether a mask is that of a cache that keeps a sliding window of keys."""
    return mask is not None and mask in _of_last_keys


def packed_bounds(mask: Tensor) -> tuple[int, ...] | None:
    """Where the documents of all rows begin when rows stand one after the other, (B * N) last; None if no row has two, and in
    an exported graph, which takes no documents.

    Padding counts as positions of the document before it, and is a document of its own at the beginning of a row.
    """
    return None if torch.compiler.is_exporting() else _bounds(mask)


@_once
def _bounds(mask: Tensor) -> tuple[int, ...] | None:
    number = mask.cummax(1).values
    if int(number.max()) <= 1:
        return None
    changes = torch.nn.functional.pad(number.diff(dim=1) != 0, (1, 0), value=True)
    return (*changes.flatten().nonzero().flatten().tolist(), mask.numel())


@_once
def leading_of(mask: Tensor) -> tuple[int, ...]:
    """How many tokens of padding each row begins with."""
    return tuple(leading_padding(mask == 0).tolist())


def _numbered(restarts: Tensor, padding: Tensor | None) -> Tensor:
    """Documents numbered from 1 where each of tokens 1, 2, ... begins one or not, (B, N - 1) bool; padding gets 0."""
    number = torch.nn.functional.pad(restarts.long().cumsum(1), (1, 0)) + 1
    return number if padding is None else number * padding


@untraced
def _all(real: Tensor) -> bool:
    return bool(real.all())
