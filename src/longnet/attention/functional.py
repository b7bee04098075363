"""``dilated_attention``: validate, choose a backend, run it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, overload

import torch
from torch import Tensor

from longnet.attention.backends import select_backend
from longnet.attention.call import AttentionInputs, checked_inputs, with_segment_offset
from longnet.attention.definition import LONGNET, AttentionDefinition, warn_uncovered
from longnet.attention.packed import boundaries
from longnet.attention.sharding import broadcast_error, peers_of
from longnet.checks import check_flags, is_int
from longnet.geometry import HeadOffsets, Pattern
from longnet.geometry.pattern import Beyond


@overload
def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: int | Sequence[int | None] | None,
    dilation_rates: int | Sequence[int],
    *,
    window: int | None = ...,
    dilated_queries: bool = ...,
    dilation_block: int = ...,
    segment_offset: int | Tensor = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    key_padding_mask: Tensor | None = ...,
    cu_seqlens: Tensor | Sequence[int] | None = ...,
    head_offsets: HeadOffsets = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
    group: Any = ...,
) -> Tensor: ...


@overload
def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: int | Sequence[int | None] | None,
    dilation_rates: int | Sequence[int],
    *,
    window: int | None = ...,
    dilated_queries: bool = ...,
    dilation_block: int = ...,
    segment_offset: int | Tensor = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    key_padding_mask: Tensor | None = ...,
    cu_seqlens: Tensor | Sequence[int] | None = ...,
    head_offsets: HeadOffsets = ...,
    return_lse: Literal[True],
    backend: str = ...,
    group: Any = ...,
) -> tuple[Tensor, Tensor]: ...


def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: int | Sequence[int | None] | None,
    dilation_rates: int | Sequence[int],
    *,
    window: int | None = None,
    dilated_queries: bool = True,
    dilation_block: int = 1,
    segment_offset: int | Tensor = 0,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    head_offsets: HeadOffsets = "interleaved",
    return_lse: bool = False,
    backend: str = "auto",
    group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dilated attention, exact: one softmax over the multiset union of all branches' keys.

    Source: LongNet, arXiv 2307.02486, sections 2.2 to 2.4, equations 10 and 11. Head ``j`` selects position ``p`` in
    the branch (w, r) when ``(p mod w) mod r`` is its offset; a query attends, in every branch that selects it, to the
    selected positions of its own segment. A key that two branches share counts twice. Linear in N in time and memory, except
    that a segment without end takes time that is quadratic in N. ``window`` to ``segment_offset`` are beyond the paper.

    Args:
        query: (B, H, N, D) of float64, float32, bfloat16 or float16, any strides. Under autocast it is cast as
            ``F.scaled_dot_product_attention`` casts.
        key: (B, Hk, N, D), Hk divides H; query head ``j`` reads head ``j // (H / Hk)``.
        value: (B, Hk, N, D).
        segment_lengths: w in tokens, an int or one per branch. Nothing needs to divide anything. None: the whole sequence is
            one segment. With a ``window`` there may be no branch: ``()``.
        dilation_rates: r, an int or one per branch, ``1 <= r <= w``.
        window: one more branch, without segments and dilation, which all heads have: a query reads the keys at distances below
            ``window``, when causal the earlier ones and its own.
        dilated_queries: False: every position is a query of every branch, and a branch's keys alone are dilated. With
            ``segment_lengths=None`` and a ``window`` that is the strided pattern of Sparse Transformers (arXiv 1904.10509), with
            other keys for each head.
        dilation_block: b, tokens: dilation counts blocks. A head selects ``p`` when ``(p mod w) // b mod r`` is its offset.
        segment_offset: c: for segments and dilation position ``p`` counts as ``p + c``. An int, or int64 (B,) on the query's
            device, one for each row; with ``cu_seqlens`` (documents,), counted from each document's start. May be negative:
            division rounds down. An int has a magnitude of at most 2**40, as all sizes have.
        is_causal: a query sees keys at positions up to its own. Changing later tokens leaves its row bit-identical, as long as
            they are finite: a later value that is NaN or infinite reaches earlier rows as 0 * NaN, as in torch's attention.
            A later key that is not finite reaches their gradients. ``key_padding_mask`` keeps both out.
        scale: of the scores, any finite number; default ``D ** -0.5``.
        key_padding_mask: (B, N) bool, True where the key is to be ignored. A padded query that is not finite needs a zero
            gradient of its row of out (and lse): it then contributes exact zeros to all gradients.
        cu_seqlens: (documents + 1,) int32 or int64, or ints: where the documents packed into one row (B = 1) begin, 0 first, and
            N last. Each is computed as if it were alone: segments and offsets restart with it, and it sees no other. A tensor
            on a device is read once and waited for, ints are not.
        head_offsets: ``"interleaved"`` (``j mod r``, the paper), ``"blocked"`` (``j // ceil(H / r)``, torchscale) or
            ``"grouped"`` (``j // (H / Hk) mod r``: heads of one key/value head select the same rows).
        return_lse: also return the natural log of the softmax denominators. It is differentiable.
        backend: ``"auto"``, or one by name; a named one that cannot run raises its reason. For debugging:
            ``"triton:general"`` is Triton without the kernels for Hopper GPUs, ``"triton:hopper"`` these alone.
        group: the ranks that share one sequence, a ``ProcessGroup`` or a ``DeviceMesh`` of one dimension. Query, key, value
            and mask are then this rank's contiguous shard, in rank order, of any length, and so is the result; every rank
            of the group makes the call. Only keys that queries of another shard read travel. ``segment_offset`` is for the
            whole sequence, the same on all ranks, and a tensor is on the CPU. None: one device has it all.

    Returns:
        out (B, H, N, D) in the query's dtype and layout; with ``return_lse`` also lse (B, H, N), float32 (float64 for
        float64). A row without any key has out 0, lse -inf and zero gradients.

    Raises:
        TypeError: an argument of the wrong type. ValueError: any other bad value; both name the argument. With a group every
            rank raises when one does, or when ranks differ in anything but the length of their shards.
    """
    try:
        pattern = _pattern(
            segment_lengths,
            dilation_rates,
            window=window,
            dilated_queries=dilated_queries,
            dilation_block=dilation_block,
            head_offsets=head_offsets,
        )
    except (TypeError, ValueError) as error:
        _broadcast_error(group, error)
        raise
    result = pattern_attention(
        query,
        key,
        value,
        pattern,
        segment_offset=segment_offset,
        is_causal=is_causal,
        scale=scale,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        return_lse=return_lse,
        backend=backend,
        group=group,
    )
    if not torch.compiler.is_compiling():
        _warn_uncovered(pattern, query, key)
    return result


def pattern_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    segment_offset: int | Tensor = 0,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    distance_bias: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    group: Any = None,
    needed_by_first: bool = False,
    definition: AttentionDefinition = LONGNET,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`dilated_attention` for a parsed pattern, with a relative bias.

    Args:
        distance_bias: (H, 2L - 1) or None. Added to the scaled score of a query at p and a key at k by head ``j`` is
            ``distance_bias[j, k - p + L - 1]``; L is at least the largest distance plus one.
        needed_by_first: give the rows alone that the first token attends to in some head, see
            :func:`longnet.geometry.needed_rows.needed_by_first`; the others are 0, have lse inf and no gradient. Neither causal
            nor masked, and for definitions that take it.
        definition: which attention.
    """
    if needed_by_first and (is_causal or key_padding_mask is not None or not definition.takes_needed_by_first):
        raise ValueError(
            f"needed_by_first=True with is_causal, a key_padding_mask or {definition.name}: expected none of them"
        )
    for name, given in (("cu_seqlens", cu_seqlens), ("distance_bias", distance_bias), ("group", group)):
        if given is not None and not definition.takes_all_options:
            raise ValueError(f"{name} given with {definition.name}, which has none: expected None")
    peers = None if group is None else peers_of(group)
    try:
        inputs = checked_inputs(
            query, key, value, pattern, is_causal=is_causal, scale=scale, mask=key_padding_mask, bias=distance_bias
        )
        check_flags(return_lse=return_lse)
        if needed_by_first:
            inputs = inputs.with_spec(needed_by_first=True)
        if cu_seqlens is not None:
            inputs = inputs.with_spec(documents=_check_documents(cu_seqlens, inputs, group))
        if not (is_int(segment_offset) and segment_offset == 0):
            inputs = with_segment_offset(inputs, segment_offset, on_host=group is not None)
        if (beyond := inputs.beyond_paper) is not None:
            _check_beyond_paper(beyond, needed_by_first, definition)
        chosen = select_backend(backend, inputs)
    except (TypeError, ValueError) as error:
        _broadcast_error(group, error)
        raise
    out, lse = definition.run(inputs, chosen, peers)
    return (out, lse) if return_lse else out


# Types of what the cache below is asked for. It tells the argument True from 1, but not (True, 2) from (1, 2).
_PLAIN = frozenset((int, bool, str, type(None)))
_INTS = frozenset((int, type(None)))
_composed = lru_cache(maxsize=256, typed=True)(Pattern.compose)


def _pattern(lengths: Any, rates: Any, **options: Any) -> Pattern:
    """:meth:`Pattern.compose`, cached for plain values; anything else it takes or refuses every time."""
    if torch.compiler.is_compiling() or not _PLAIN.issuperset(map(type, options.values())):
        return Pattern.compose(lengths, rates, **options)
    lengths, rates = (tuple(values) if isinstance(values, list) else values for values in (lengths, rates))
    for values in (lengths, rates):
        if not _INTS.issuperset(map(type, values if type(values) is tuple else (values,))):
            return Pattern.compose(lengths, rates, **options)
    return _composed(lengths, rates, **options)


def _check_beyond_paper(beyond: Beyond, needed_by_first: bool, definition: AttentionDefinition) -> None:
    if needed_by_first or not definition.takes_all_options:
        raise ValueError(f"{beyond} with needed_by_first or {definition.name}: expected what LongNet's paper has")


def _warn_uncovered(pattern: Pattern, query: Tensor, key: Tensor) -> None:
    warn_uncovered(pattern.grouped(query.shape[1], key.shape[1]), query.shape[1])


def _broadcast_error(group: Any, error: Exception) -> None:
    """Other ranks of the group wait for this one's call: they raise too."""
    if group is not None and (peers := peers_of(group)).size > 1:
        broadcast_error(peers, error)


def _check_documents(cu_seqlens: Tensor | Sequence[int], inputs: AttentionInputs, group: Any) -> tuple[int, ...]:
    if group is not None:
        raise ValueError(
            "cu_seqlens given with a group: a document's segments restart where it begins, and ranks agree on those of one "
            "sequence; expected one of the two. Give each rank whole documents instead"
        )
    batch = inputs.query.shape[0]
    if batch != 1:
        raise ValueError(f"query has B = {batch} with cu_seqlens: expected documents packed into one row, B = 1")
    return boundaries(cu_seqlens, inputs.length)
