"""``dilated_attention``: validate, choose a backend, run it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, overload

import torch
from torch import Tensor

from longnet.backends import Spec, select_backend
from longnet.backends.operators import autocast_dtype, lse_dtype
from longnet.geometry import HeadOffsets, Pattern, uncovered_positions
from longnet.packing import boundaries, packed_attention
from longnet.sharding import give_up, peers_of, sharded_attention

# Positions that are counted for a warning where a pattern's selection does not repeat early enough to count them all.
_COUNTED = 1 << 20


@overload
def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: int | Sequence[int],
    dilation_rates: int | Sequence[int],
    *,
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
    segment_lengths: int | Sequence[int],
    dilation_rates: int | Sequence[int],
    *,
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
    segment_lengths: int | Sequence[int],
    dilation_rates: int | Sequence[int],
    *,
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
    selected positions of its own segment. A key that two branches share counts twice. Linear in N in time and memory.

    Args:
        query: (B, H, N, D) of float64, float32, bfloat16 or float16, any strides. Under autocast it is cast as
            ``F.scaled_dot_product_attention`` casts.
        key: (B, Hk, N, D), Hk divides H; query head ``j`` reads head ``j // (H / Hk)``.
        value: (B, Hk, N, D).
        segment_lengths: w in tokens, an int or one per branch. Nothing needs to divide anything.
        dilation_rates: r, an int or one per branch, ``1 <= r <= w``.
        is_causal: a query sees keys at positions up to its own. Changing later tokens leaves its row bit-identical, as long as
            they are finite: a later value that is NaN or infinite reaches earlier rows as 0 * NaN, as in torch's attention.
            A later key that is not finite reaches their gradients. ``key_padding_mask`` keeps both out.
        scale: of the scores, any finite number; default ``D ** -0.5``.
        key_padding_mask: (B, N) bool, True where the key is to be ignored. A padded query that is not finite needs a zero
            gradient of its row of out (and lse): it then contributes exact zeros to all gradients.
        cu_seqlens: (documents + 1,) int32 or int64, or ints: where the documents packed into one row (B = 1) begin, 0 first, and
            N last. Each is computed as if it were alone: segments and offsets restart with it, and it sees no other. A tensor
            on a device is read once and waited for, ints are not.
        head_offsets: ``"interleaved"`` (``j mod r``, the paper) or ``"blocked"`` (``j // ceil(H / r)``, torchscale).
        return_lse: also return the natural log of the softmax denominators. It is differentiable.
        backend: ``"auto"``, or one by name; a named one that cannot run raises its reason.
        group: the ranks that share one sequence, a ``ProcessGroup`` or a ``DeviceMesh`` of one dimension. Query, key, value
            and mask are then this rank's contiguous shard, in rank order, of any length, and so is the result; every rank
            of the group makes the call. Only selected rows of segments that cross a shard's border travel. None: one
            device has it all.

    Returns:
        out (B, H, N, D) in the query's dtype and layout; with ``return_lse`` also lse (B, H, N), float32 (float64 for
        float64). A row without any key has out 0, lse -inf and zero gradients.

    Raises:
        TypeError: an argument of the wrong type. ValueError: any other bad value; both name the argument. With a group every
            rank raises when one does, or when ranks differ in anything but the length of their shards.
    """
    try:
        pattern = Pattern.parse(segment_lengths, dilation_rates, head_offsets)
    except (TypeError, ValueError) as error:
        _give_up(group, error)
        raise
    return pattern_attention(
        query,
        key,
        value,
        pattern,
        is_causal=is_causal,
        scale=scale,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        return_lse=return_lse,
        backend=backend,
        group=group,
    )


def pattern_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    distance_bias: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`dilated_attention` for a parsed pattern, with a relative bias.

    Args:
        distance_bias: (H, 2L - 1) or None. Added to the scaled score of a query at p and a key at k by head ``j`` is
            ``distance_bias[j, k - p + L - 1]``; L is at least the largest distance plus one.
    """
    peers = None if group is None else peers_of(group)
    try:
        settings = (key_padding_mask, distance_bias, pattern, is_causal, scale, return_lse)
        query, key, value, scale = check_call(query, key, value, *settings)
        chosen = select_backend(backend, query.device.type, query.dtype, query.shape[-1], distance_bias is not None)
        bounds = None if cu_seqlens is None else _check_documents(cu_seqlens, query, group)
    except (TypeError, ValueError) as error:
        _give_up(group, error)
        raise
    if not torch.compiler.is_compiling():
        warn_uncovered(pattern, query.shape[1])
    spec = Spec(pattern, is_causal, scale)
    inputs = (query, key, value, key_padding_mask, distance_bias, spec)
    if bounds is not None:
        out, lse = packed_attention(*inputs, chosen, bounds)
        return (out, lse) if return_lse else out
    out, lse = chosen.run(*inputs) if peers is None or peers.size == 1 else sharded_attention(*inputs, chosen, peers)
    return (out, lse) if return_lse else out


def check_call(query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor, float]:
    """(query, key, value, scale) as a backend takes them: checked, cast by autocast, the scale's default filled in.

    Args:
        settings: key_padding_mask, distance_bias, pattern, is_causal, scale and return_lse of :func:`pattern_attention`.

    Raises:
        TypeError, ValueError: as :func:`dilated_attention`. RuntimeError: inside of torch.jit.trace.
    """
    refuse_tracing()
    query, key, value = _check_tensors(query, key, value)
    return query, key, value, _check_settings(query, *settings)


def refuse_tracing() -> None:
    """A trace would hold the example's length, padding and positions for good.

    Raises:
        RuntimeError: inside of torch.jit.trace.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise RuntimeError(
            "dilated attention cannot be recorded by torch.jit.trace, nor by the ONNX exporter that uses it: expected "
            "torch.export.export, torch.compile or torch.onnx.export(..., dynamo=True)"
        )


def _give_up(group: Any, error: Exception) -> None:
    """Other ranks of the group wait for this one's call: they raise too."""
    if group is not None and (peers := peers_of(group)).size > 1:
        give_up(peers, error)


def _check_documents(cu_seqlens: Tensor | Sequence[int], query: Tensor, group: Any) -> tuple[int, ...]:
    if group is not None:
        raise ValueError(
            "cu_seqlens given with a group: a document's segments restart where it begins, and ranks agree on those of one "
            "sequence; expected one of the two. Give each rank whole documents instead"
        )
    if query.shape[0] != 1:
        raise ValueError(
            f"query has B = {query.shape[0]} with cu_seqlens: expected documents packed into one row, B = 1"
        )
    return boundaries(cu_seqlens, query.shape[2])


def _check_settings(
    query: Tensor,
    mask: Tensor | None,
    distance_bias: Tensor | None,
    pattern: Pattern,
    is_causal: bool,
    scale: float | None,
    return_lse: bool,
) -> float:
    """The scale."""
    if pattern.head_numbers is not None and query.shape[1] != len(pattern.head_numbers.numbers):
        raise ValueError(
            f"query has {query.shape[1]} heads: expected those of head_numbers={pattern.head_numbers.numbers}"
        )
    _check_mask(mask, query)
    for name, flag in (("is_causal", is_causal), ("return_lse", return_lse)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}={flag!r} has type {type(flag).__name__}: expected a bool")
    scale = check_scale(scale, query.shape[-1], query.dtype)
    if distance_bias is not None:
        _check_bias(distance_bias, query, pattern)
    return scale


def check_scale(scale: float | None, head_dim: int, dtype: torch.dtype) -> float:
    """The scale of the scores, ``head_dim ** -0.5`` for None, as the arithmetic for inputs of ``dtype`` can hold it.

    Raises:
        TypeError: no number. ValueError: not finite in that arithmetic, float32 or float64.
    """
    if scale is None:
        return float(head_dim**-0.5)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale={scale!r} has type {type(scale).__name__}: expected a float or None")
    kind = torch.finfo(lse_dtype(dtype))
    if not abs(scale) <= kind.max:
        raise ValueError(f"scale={scale} is not finite in {kind.dtype}: expected at most {kind.max:g} in magnitude")
    # Kernels would round a smaller one to 0 themselves, after they have looked at its sign.
    return float(scale) if abs(scale) >= kind.smallest_normal * kind.eps else 0.0


@lru_cache(maxsize=256)
def warn_uncovered(pattern: Pattern, heads: int) -> None:
    """Warn, once per pattern and number of heads, of positions that no head ever reaches."""
    counted = "all"
    try:
        uncovered = uncovered_positions(pattern, heads)
    except ValueError:
        # The selection repeats too late to be counted. A warning must not stop a valid call: count the first positions.
        uncovered = uncovered_positions(pattern, heads, _COUNTED)
        counted = f"the first {_COUNTED:,}"
    if uncovered:
        warnings.warn(
            f"segment_lengths={pattern.segment_lengths} and dilation_rates={pattern.dilation_rates} with {heads} heads "
            f"leave {uncovered.description} to no head ({float(uncovered.fraction):.1%} of {counted}): they get zero "
            "attention. Use at least as many heads as the rate, or add a branch of rate 1.",
            UserWarning,
            stacklevel=4,
        )


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tensors = {"query": query, "key": key, "value": value}
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} has type {type(x).__name__}: expected a torch.Tensor")
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected 4 dimensions (B, H, N, D)")
        if not x.is_floating_point():
            raise TypeError(f"{name} has dtype {x.dtype}: expected float64, float32, bfloat16 or float16")
    query, key, value = _autocast(query, key, value)
    batch, heads, length, dim = query.shape
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}: expected the query's {query.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name} is on {x.device}: expected the query's device {query.device}")
        if x.shape[0] != batch or x.shape[2] != length or x.shape[3] != dim:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: expected (B, Hk, N, D) = ({batch}, Hk, {length}, {dim}) as the query's"
            )
    if value.shape[1] != key.shape[1]:
        raise ValueError(f"value has {value.shape[1]} heads: expected as many as key, {key.shape[1]}")
    if heads < 1 or dim < 1:
        raise ValueError(f"query has shape {tuple(query.shape)}: expected at least one head and one channel")
    if key.shape[1] < 1 or heads % key.shape[1]:
        raise ValueError(f"query has {heads} heads and key has {key.shape[1]}: expected a multiple")
    return query, key, value


def _check_mask(mask: Tensor | None, query: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"key_padding_mask has type {type(mask).__name__}: expected a bool torch.Tensor or None")
    if mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask has dtype {mask.dtype}: expected torch.bool, True where a key is ignored")
    expected = (query.shape[0], query.shape[2])
    if mask.dim() != 2 or mask.shape[0] != expected[0] or mask.shape[1] != expected[1]:
        raise ValueError(f"key_padding_mask has shape {tuple(mask.shape)}: expected (B, N) = {expected}")
    if mask.device != query.device:
        raise ValueError(f"key_padding_mask is on {mask.device}: expected the query's device {query.device}")


def _check_bias(bias: Tensor, query: Tensor, pattern: Pattern) -> None:
    if bias.dim() != 2 or bias.shape[0] != query.shape[1] or bias.shape[1] % 2 != 1:
        raise ValueError(f"distance_bias has shape {tuple(bias.shape)}: expected (H, 2L - 1) with H={query.shape[1]}")
    reach = min(max(pattern.segment_lengths), max(1, query.shape[2]))
    if bias.shape[1] < 2 * reach - 1:
        raise ValueError(f"distance_bias holds {bias.shape[1]} distances: expected at least {2 * reach - 1}")


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = autocast_dtype(query.device.type)
    if query.dtype == torch.float64 or dtype is None:
        return query, key, value
    return query.to(dtype), key.to(dtype), value.to(dtype)
