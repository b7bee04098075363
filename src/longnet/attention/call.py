"""One call of attention: its inputs, checked once, what the backward pass needs, and how torch's operators take both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longnet.checks import check_flags, check_number
from longnet.geometry import HEAD_OFFSETS, Branch, Pattern
from longnet.geometry.pattern import LONGEST_SEGMENT, Beyond, HeadNumbers
from longnet.hashed import hash_once
from longnet.runtime.autocast import autocast_dtype


@hash_once
@dataclass(frozen=True)
class AttentionSpec:
    """What is computed, apart from the tensors. Hashable. Source: arXiv 2307.02486, sections 2.2 to 2.4.

    Args:
        scale: of the scores.
        documents: where the documents packed into one row begin, 0 first and N last; None for one sequence. Backends get the
            documents one by one, see :mod:`longnet.attention.packed`.
        needed_by_first: the caller reads only the rows that token 0 attends to in some head, see
            :func:`longnet.geometry.needed_rows.needed_by_first`. The other rows may hold anything finite, and the caller
            gives them an lse of inf before the backward pass.
        segment_offset: on the grid position ``p`` counts as ``p + segment_offset``.
    """

    pattern: Pattern
    is_causal: bool
    scale: float
    documents: tuple[int, ...] | None = None
    needed_by_first: bool = False
    segment_offset: int = 0

    @property
    def beyond_paper(self) -> Beyond | None:
        """A part that LongNet's paper does not have, as it was asked for; None if all is the paper's."""
        return self.pattern.beyond_paper or (
            Beyond("segment_offset", self.segment_offset) if self.segment_offset else None
        )

    def encode(self) -> tuple[tuple[int, ...], float]:
        """As torch's operators take it, see :func:`decode`: integers and the scale."""
        assert self.documents is None
        pattern = self.pattern
        numbers = pattern.head_numbers
        flags = (self.is_causal, self.needed_by_first, HEAD_OFFSETS.index(pattern.head_offsets), numbers is not None)
        beyond = (pattern.window or 0, pattern.dilated_queries, pattern.group, self.segment_offset)
        blocks = (branch.block for branch in pattern.branches)
        heads = () if numbers is None else (numbers.total, *numbers.numbers)
        branches = (len(pattern.branches), *pattern.segment_lengths, *pattern.dilation_rates, *blocks)
        return (*flags, *beyond, *branches, *heads), self.scale


_encoded = lru_cache(maxsize=256)(AttentionSpec.encode)


def decode(integers: Sequence[int], scale: float) -> AttentionSpec:
    """The spec that :meth:`AttentionSpec.encode` gave as these. Cached."""
    return _decode(tuple(integers), scale)


@lru_cache(maxsize=256)
def _decode(integers: tuple[int, ...], scale: float) -> AttentionSpec:
    is_causal, needed_by_first, offsets, numbered, window, dilated, group, segment_offset, count, *rest = integers
    lengths, rates, blocks, heads = (*(rest[i * count : (i + 1) * count] for i in range(3)), tuple(rest[3 * count :]))
    branches = tuple(map(Branch, lengths, rates, blocks))
    numbers = HeadNumbers(heads[1:], heads[0]) if numbered else None
    pattern = Pattern(branches, HEAD_OFFSETS[offsets], numbers, window or None, bool(dilated), group)
    return AttentionSpec(
        pattern, bool(is_causal), scale, needed_by_first=bool(needed_by_first), segment_offset=segment_offset
    )


@dataclass(frozen=True)
class AttentionInputs:
    """The tensors of a call, as :func:`checked_inputs` leaves them, and its spec.

    Args:
        query: (B, H, N, D).
        key, value: (B, Hk, N, D), Hk divides H; query head j reads head ``j // (H / Hk)``.
        mask: (B, N) bool, True where a key is to be ignored, or None.
        bias: (H, 2L - 1) or None. A query at p and a key at k have ``bias[j, k - p + L - 1]`` added to their scaled score.
        offsets: (B,) int64 in place of the spec's ``segment_offset``, one for each row of the batch, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    bias: Tensor | None
    spec: AttentionSpec
    offsets: Tensor | None = None

    @property
    def length(self) -> int:
        """N."""
        return self.query.shape[2]

    @property
    def group(self) -> int:
        """Query heads that read one key/value head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """In the order of the operators' arguments; the last two are offsets and bias."""
        return self.query, self.key, self.value, self.mask, self.offsets, self.bias

    @property
    def beyond_paper(self) -> Beyond | None:
        """A part that LongNet's paper does not have, as it was asked for; None if all is the paper's."""
        return self.spec.beyond_paper or (None if self.offsets is None else Beyond("a segment_offset for each row"))

    def flat(self) -> tuple[Any, ...]:
        """As torch's operators take it: tensors, integers and the scale. The inverse is :func:`from_flat`."""
        encode = AttentionSpec.encode if torch.compiler.is_compiling() else _encoded
        return *self.tensors, *encode(self.spec)

    def with_spec(self, **changes: Any) -> AttentionInputs:
        """The same tensors, and a spec with these changes."""
        return self.of_spec(replace(self.spec, **changes))

    def of_spec(self, spec: AttentionSpec) -> AttentionInputs:
        """The same tensors, and another spec."""
        return AttentionInputs(self.query, self.key, self.value, self.mask, self.bias, spec, self.offsets)

    def rows(self, part: Tensor, segment_offset: int) -> AttentionInputs:
        """Some rows of the batch, copied, all with one offset of the grid."""
        taken = (None if x is None else x.index_select(0, part) for x in self.tensors[:4])
        query, key, value, mask = taken
        assert query is not None and key is not None and value is not None
        spec = replace(self.spec, segment_offset=segment_offset)
        return AttentionInputs(query, key, value, mask, self.bias, spec)

    def tokens(self, part: slice) -> AttentionInputs:
        """Some of the tokens, as views."""
        query, key, value = (x[:, :, part] for x in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value, mask=None if self.mask is None else self.mask[:, part])

    def empty_outputs(self) -> tuple[Tensor, Tensor]:
        """Uninitialised out like the query, and lse (B, H, N)."""
        query = self.query
        batch, heads, length, _ = query.shape
        return torch.empty_like(query), query.new_empty((batch, heads, length), dtype=lse_dtype(query.dtype))

    def mixture_of_nothing(self) -> tuple[Tensor, Tensor]:
        """out and lse of a softmax over no keys, 0 and -inf, both in the dtype of the statistics."""
        kind = lse_dtype(self.query.dtype)
        out = torch.zeros_like(self.query, dtype=kind)
        return out, out.new_full(out.shape[:-1], -torch.inf)

    def empty_gradients(self) -> Gradients:
        """Uninitialised, each like its tensor."""
        bias = self.query.new_empty(0) if self.bias is None else torch.empty_like(self.bias)
        return Gradients(torch.empty_like(self.query), torch.empty_like(self.key), torch.empty_like(self.value), bias)


# How many of an operator's arguments are tensors, and how many are the spec.
TENSORS, SPEC = 6, 2


def from_flat(arguments: Sequence[Any]) -> AttentionInputs:
    """The inverse of :meth:`AttentionInputs.flat`."""
    query, key, value, mask, offsets, bias, *spec = arguments
    return AttentionInputs(query, key, value, mask, bias, decode(*spec), offsets)


@dataclass(frozen=True)
class SavedForward:
    """What a backward pass needs: the inputs, and the merged out and lse, see :mod:`longnet.attention.merge`."""

    inputs: AttentionInputs
    out: Tensor
    lse: Tensor


class Gradients(NamedTuple):
    """Each like its tensor; that of the bias is empty where there is none."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor

    def zeroed(self) -> Gradients:
        """Filled with zeros, in place."""
        for gradient in self:
            gradient.zero_()
        return self


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics and mixing are float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def checked_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    is_causal: bool,
    scale: float | None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> AttentionInputs:
    """A user's tensors as backends take them: checked, cast by autocast, the scale's default filled in.

    Raises:
        TypeError, ValueError: as :func:`longnet.dilated_attention`. RuntimeError: inside of torch.jit.trace.
    """
    refuse_tracing()
    query, key, value = _check_tensors(query, key, value)
    if pattern.head_numbers is not None and query.shape[1] != len(pattern.head_numbers.numbers):
        raise ValueError(
            f"query has {query.shape[1]} heads: expected those of head_numbers={pattern.head_numbers.numbers}"
        )
    if mask is not None:
        check_mask(mask, query)
    check_flags(is_causal=is_causal)
    scale = check_scale(scale, query.shape[-1], query.dtype)
    if bias is not None:
        _check_bias(bias, query, pattern)
    make = _make_spec if torch.compiler.is_compiling() else _spec
    return AttentionInputs(query, key, value, mask, bias, make(pattern, query.shape[1], key.shape[1], is_causal, scale))


def _make_spec(pattern: Pattern, heads: int, key_heads: int, is_causal: bool, scale: float) -> AttentionSpec:
    return AttentionSpec(pattern.grouped(heads, key_heads), is_causal, scale)


# The same object for the same call: it has its hash and its encoding.
_spec = lru_cache(maxsize=256)(_make_spec)


def with_segment_offset(
    inputs: AttentionInputs, segment_offset: int | Tensor, *, on_host: bool = False
) -> AttentionInputs:
    """The same on another grid.

    Args:
        on_host: a tensor is on the CPU, where it is read, in place of the query's device.

    Raises:
        TypeError, ValueError: as :func:`longnet.dilated_attention`.
    """
    documents, query = inputs.spec.documents, inputs.query
    rows, axis = (query.shape[0], "B") if documents is None else (len(documents) - 1, "documents")
    device = torch.device("cpu") if on_host else query.device
    check_segment_offset(
        segment_offset, rows, device, "a CPU tensor with a group, or an int" if on_host else None, axis
    )
    if isinstance(segment_offset, Tensor):
        return AttentionInputs(query, inputs.key, inputs.value, inputs.mask, inputs.bias, inputs.spec, segment_offset)
    if torch.compiler.is_compiling() and segment_offset != 0:
        # As a tensor, so that another number is no other graph.
        offsets = torch.full((rows,), segment_offset, dtype=torch.int64, device=device)
        return replace(inputs, offsets=offsets)
    return inputs.of_spec(_on_grid(inputs.spec, segment_offset))


@lru_cache(maxsize=256)
def _on_grid(spec: AttentionSpec, segment_offset: int) -> AttentionSpec:
    return replace(spec, segment_offset=segment_offset)


def check_segment_offset(
    segment_offset: object, rows: int, device: torch.device, expected: str | None = None, axis: str = "B"
) -> None:
    """Raises TypeError, ValueError: neither an int of at most 2**40 nor an int64 tensor (rows,) on the device."""
    if isinstance(segment_offset, Tensor):
        if segment_offset.dtype != torch.int64:
            raise TypeError(f"segment_offset has dtype {segment_offset.dtype}: expected torch.int64, or an int")
        if segment_offset.dim() != 1 or segment_offset.shape[0] != rows:
            raise ValueError(
                f"segment_offset has shape {tuple(segment_offset.shape)}: expected ({axis},) = ({rows},), or an int"
            )
        if segment_offset.device != device:
            expected = expected or f"the query's device {device}"
            raise ValueError(f"segment_offset is on {segment_offset.device}: expected {expected}")
        return
    if not isinstance(segment_offset, int) or isinstance(segment_offset, bool):
        raise TypeError(
            f"segment_offset={segment_offset!r} has type {type(segment_offset).__name__}: "
            f"expected an int, or an int64 tensor ({axis},)"
        )
    if not -LONGEST_SEGMENT <= segment_offset <= LONGEST_SEGMENT:
        raise ValueError(f"segment_offset={segment_offset}: expected at most {LONGEST_SEGMENT} in magnitude")


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


def check_scale(scale: float | None, head_dim: int, dtype: torch.dtype) -> float:
    """The scale of the scores, ``head_dim ** -0.5`` for None, as the arithmetic for inputs of ``dtype`` can hold it.

    Raises:
        TypeError: no number. ValueError: not finite in that arithmetic, float32 or float64.
    """
    if scale is None:
        return float(head_dim**-0.5)
    check_number("scale", scale)
    kind = torch.finfo(lse_dtype(dtype))
    if not abs(scale) <= kind.max:
        shown = scale if isinstance(scale, float) else f"{Decimal(scale):.6g}"
        raise ValueError(f"scale={shown} is not finite in {kind.dtype}: expected at most {kind.max:g} in magnitude")
    # Kernels would round a smaller one to 0 themselves, after they have looked at its sign.
    return float(scale) if abs(scale) >= kind.smallest_normal * kind.eps else 0.0


def check_tensor(name: str, x: object, axes: str, dtypes: str) -> None:
    """Raises TypeError, ValueError: no tensor of four ``axes`` and of a floating type; ``dtypes`` is for the message."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} has type {type(x).__name__}: expected a torch.Tensor")
    if x.dim() != 4:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected 4 dimensions {axes}")
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}: expected {dtypes}")
    _check_layout(name, x)


def _check_layout(name: str, x: Tensor) -> None:
    if x.layout != torch.strided:
        raise TypeError(f"{name} has the layout {x.layout}: expected torch.strided, to_dense() gives it")


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    for name, x in {"query": query, "key": key, "value": value}.items():
        check_tensor(name, x, "(B, H, N, D)", "float64, float32, bfloat16 or float16")
    query, key, value = _autocast(query, key, value)
    batch, heads, length, dim = query.shape
    dtype, device = query.dtype, query.device
    for name, x in (("key", key), ("value", value)):
        if x.dtype != dtype:
            raise ValueError(f"{name} has dtype {x.dtype}: expected the query's {dtype}")
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}: expected the query's device {device}")
        rows, _, tokens, channels = x.shape
        if rows != batch or tokens != length or channels != dim:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: expected (B, Hk, N, D) = ({batch}, Hk, {length}, {dim}) as the query's"
            )
    key_heads, value_heads = key.shape[1], value.shape[1]
    if value_heads != key_heads:
        raise ValueError(f"value has {value_heads} heads: expected as many as key, {key_heads}")
    if heads < 1 or dim < 1:
        raise ValueError(f"query has shape {tuple(query.shape)}: expected at least one head and one channel")
    if key_heads < 1 or heads % key_heads:
        raise ValueError(f"query has {heads} heads and key has {key_heads}: expected a multiple")
    return query, key, value


def check_mask(mask: object, query: Tensor, axes: str = "(B, N)") -> None:
    """Raises TypeError, ValueError: no bool tensor of the query's batch and tokens, on its device."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"key_padding_mask has type {type(mask).__name__}: expected a bool torch.Tensor or None")
    if mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask has dtype {mask.dtype}: expected torch.bool, True where a key is ignored")
    _check_layout("key_padding_mask", mask)
    expected = (query.shape[0], query.shape[2])
    if mask.dim() != 2 or mask.shape[0] != expected[0] or mask.shape[1] != expected[1]:
        raise ValueError(f"key_padding_mask has shape {tuple(mask.shape)}: expected {axes} = {expected}")
    if mask.device != query.device:
        raise ValueError(f"key_padding_mask is on {mask.device}: expected the query's device {query.device}")


def _check_bias(bias: Tensor, query: Tensor, pattern: Pattern) -> None:
    if bias.dim() != 2 or bias.shape[0] != query.shape[1] or bias.shape[1] % 2 != 1:
        raise ValueError(f"distance_bias has shape {tuple(bias.shape)}: expected (H, 2L - 1) with H={query.shape[1]}")
    check_distances(bias, pattern, query.shape[2])


def check_distances(bias: Tensor, pattern: Pattern, length: int) -> None:
    """Refuse a bias (H, 2L - 1) without all distances in a segment of ``length`` tokens."""
    least = 2 * pattern.span(length) - 1
    if bias.shape[1] < least:
        raise ValueError(f"distance_bias holds {bias.shape[1]} distances: expected at least {least}")


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = autocast_dtype(query.device.type)
    if query.dtype == torch.float64 or dtype is None:
        return query, key, value
    return query.to(dtype), key.to(dtype), value.to(dtype)
