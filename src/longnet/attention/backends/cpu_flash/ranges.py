"""Queries that read ranges of chosen keys, by torch's flash attention kernel: a few queries, and a mask, in each call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longnet.attention import merge
from longnet.attention.backends.views import repeat_heads, signed
from longnet.attention.call import AttentionInputs
from longnet.attention.key_ranges import KeyRanges, index_of, key_ranges
from longnet.runtime.torch_internals import cpu_flash, cpu_flash_backward


@dataclass(frozen=True)
class _Call:
    """One call of the kernel: these queries and keys of a part, by number, and which of them meet.

    Args:
        bias: 0 or -inf, (queries, keys) or (B, 1, queries, keys).
        empty: the queries that meet no key, (queries,) or (B, 1, queries).
    """

    queries: slice
    keys: slice
    bias: Tensor
    empty: Tensor


class _Part:
    """The rows of one part: views where they lie at equal steps, others gathered."""

    def __init__(self, ranges: KeyRanges, inputs: AttentionInputs) -> None:
        self.ranges, self.inputs = ranges, inputs

    def queries(self, some: slice = slice(None)) -> tuple[slice, Any, Any]:
        """The index of queries, by number, in a (B, H, N, ...) tensor; none occurs twice."""
        return index_of(self.ranges.heads, self.ranges.queries[some], self.ranges.heads.device)

    def keys(self) -> tuple[slice, Any, Any]:
        """The index of the keys."""
        return index_of(self.ranges.heads, self.ranges.keys, self.ranges.heads.device)

    def calls(self, dtype: torch.dtype) -> Iterator[_Call]:
        ranges, mask = self.ranges, self.inputs.mask
        gone = None if mask is None else mask[:, None, None, ranges.keys]
        for low, high, first, last in ranges.cut(1 << 24):
            if first >= last:
                # These queries read nothing.
                continue
            place = torch.arange(first, last, device="cpu")
            unread = (place < ranges.low[low:high, None]) | (place >= ranges.high[low:high, None])
            if gone is not None:
                unread = unread | gone[..., first:last]
            bias = torch.zeros_like(unread, dtype=dtype).masked_fill_(unread, -torch.inf)
            yield _Call(slice(low, high), slice(first, last), bias, unread.all(-1))


def _parts(inputs: AttentionInputs) -> Iterator[_Part]:
    spec = inputs.spec
    for ranges in key_ranges(spec.pattern, inputs.query.shape[1], inputs.length, spec.is_causal, spec.segment_offset):
        yield _Part(ranges, inputs)


def _rows(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Keys and values by query head; whatever a padded one holds (a NaN, say) must not reach 0 * value."""
    key, value = (repeat_heads(x.contiguous(), inputs.group) for x in (inputs.key, inputs.value))
    if inputs.mask is not None:
        key, value = (x.masked_fill(inputs.mask[:, None, :, None], 0.0) for x in (key, value))
    return key, value


def mix_ranges(inputs: AttentionInputs, out: Tensor, lse: Tensor) -> None:
    """Mix all parts into out and lse, in place."""
    scale = inputs.spec.scale
    key, value = _rows(inputs)
    # The kernel takes a scale above 0, so its sign goes into the query.
    query = signed(inputs.query, scale).contiguous()
    for part in _parts(inputs):
        q, k, v = query[part.queries()], key[part.keys()], value[part.keys()]
        for call in part.calls(q.dtype):
            found, found_lse = cpu_flash(
                q[:, :, call.queries], k[:, :, call.keys], v[:, :, call.keys], 0.0, False, attn_mask=call.bias,
                scale=abs(scale) or 1.0,
            )  # fmt: skip
            found = found.masked_fill(call.empty[..., None], 0.0)
            found_lse = found_lse.masked_fill(call.empty, -torch.inf)
            place = part.queries(call.queries)
            rows, rows_lse = out[place], lse[place]
            merge.merge_(rows, rows_lse, found, found_lse)
            out[place], lse[place] = rows, rows_lse


def range_gradients(
    inputs: AttentionInputs, query: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value by query head, (B, H, N, D) in the dtype of the lse.

    Args:
        query, out, lse: of the joint softmax, as :func:`longnet.attention.merge.rows_for_backward` gives them.
    """
    key, value = _rows(inputs)
    dim, scale = query.shape[-1], inputs.spec.scale
    if grad_lse is not None:
        grad_out, query, key, value, out = merge.fold_lse_gradient(grad_out, query, key, value, out, grad_lse)
    query, out, grad_out = query.contiguous(), out.contiguous(), grad_out.contiguous()
    totals = tuple(torch.zeros_like(query, dtype=lse.dtype) for _ in range(3))
    for part in _parts(inputs):
        q, o, row_lse, grad = (x[part.queries()] for x in (query, out, lse, grad_out))
        k, v = (x[part.keys()] for x in (key, value))
        of_keys = [torch.zeros_like(k, dtype=lse.dtype) for _ in range(2)]
        for call in part.calls(q.dtype):
            rows, keys = (slice(None), slice(None), call.queries), (slice(None), slice(None), call.keys)
            grad_q, *grads = cpu_flash_backward(
                grad[rows],
                q[rows],
                k[keys],
                v[keys],
                o[rows],
                row_lse[rows],
                0.0,
                False,
                attn_mask=call.bias,
                scale=scale,
            )
            totals[0][part.queries(call.queries)] += grad_q
            for total, one in zip(of_keys, grads, strict=True):
                total[keys] += one
        for total, own in zip(totals[1:], of_keys, strict=True):
            total[part.keys()] += own
    grad_query, grad_key, grad_value = (total[..., :dim] for total in totals)
    return grad_query, grad_key, grad_value
