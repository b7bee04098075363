"""The portable backend: plain torch operations, for every device and for what faster backends refuse.

Memory is linear in the length, see :mod:`longnet.attention.chunked`. Everything is computed in float32 (float64 for float64
inputs), whatever the inputs' dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from longnet.attention import merge
from longnet.attention.backends.views import bias_columns, padding_view, repeat_heads, sum_heads, tile_view
from longnet.attention.by_offset import backward_by_offset, by_offset
from longnet.attention.call import AttentionInputs, Gradients, SavedForward, lse_dtype
from longnet.attention.chunked import Rows
from longnet.attention.key_ranges import KeyRanges, index_of, key_ranges
from longnet.geometry import BranchPlan, Tile, make_plan


def unsupported_reason(inputs: AttentionInputs) -> str | None:
    """Why this backend cannot run these inputs, or None when it can."""
    dtype = inputs.query.dtype
    if not dtype.is_floating_point or torch.finfo(dtype).bits < 16:
        return f"it takes float64, float32, bfloat16 and float16, not {dtype}"
    if inputs.offsets is not None and not inputs.offsets.is_cpu:
        return f"it reads a segment_offset for each row on the host, which would wait for {inputs.offsets.device}"
    return None


def _gathered(x: Tensor, tile: Tile) -> Tensor:
    """The tile's rows of (B, H, N, ...) as (groups, rows, ...), a group for every (batch, segment, offset, head)."""
    return tile_view(x, tile).to(lse_dtype(x.dtype)).flatten(0, 3)


def _bias_heads(tile: Tile, device: torch.device) -> Tensor:
    """The head of each (offset, head) pair of the tile."""
    by_offset = torch.arange(tile.offsets, device=device)[:, None] * tile.head_step_per_offset
    return (tile.head + by_offset + torch.arange(tile.heads, device=device) * tile.head_step).flatten()


def _rows(tile: Tile, inputs: AttentionInputs) -> Rows:
    query, key, value = (_gathered(x, tile) for x in (inputs.query, inputs.key, inputs.value))
    padded = bias = None
    if inputs.mask is not None:
        shape = (inputs.query.shape[0], *tile.shape)
        padded = padding_view(inputs.mask, tile).expand(shape).reshape(-1, tile.rows)
    if inputs.bias is not None:
        bias = inputs.bias[
            _bias_heads(tile, query.device), bias_columns(inputs.bias, tile.rows, tile.rows, tile.row_step)
        ].to(query.dtype)
    return Rows(query, key, value, inputs.spec.scale, inputs.spec.is_causal, padded, bias)


class _RangeRows:
    """The rows of a window, or of a branch that is no tile, as :func:`_rows`; and where they are in whole tensors."""

    def __init__(self, part: KeyRanges, device: torch.device) -> None:
        self.part, self.heads = part, part.heads.to(device)
        self.at_queries, self.at_keys = (index_of(part.heads, x, device) for x in (part.queries, part.keys))

    def of(self, inputs: AttentionInputs) -> Rows:
        """What is computed."""
        query, key, value = (
            x[at].to(lse_dtype(x.dtype)).flatten(0, 1)
            for x, at in (
                (inputs.query, self.at_queries),
                (inputs.key, self.at_keys),
                (inputs.value, self.at_keys),
            )
        )
        padded = None
        if inputs.mask is not None:
            padded = inputs.mask[:, self.at_keys[2]].repeat_interleave(len(self.heads), 0)
        bias = None if inputs.bias is None else inputs.bias.index_select(0, self.heads).to(query.dtype)
        return Rows(query, key, value, inputs.spec.scale, padded=padded, bias=bias, ranges=self.part)

    def queries(self, x: Tensor) -> Tensor:
        """The queries' entries of (B, H, N, ...) as (groups, rows, ...)."""
        return x[self.at_queries].flatten(0, 1)


def _by_query_head(inputs: AttentionInputs) -> AttentionInputs:
    """Keys and values repeated for each query head. Keys are 0 where they are padding: a NaN must not reach 0 * key."""
    key, value = (repeat_heads(x, inputs.group) for x in (inputs.key, inputs.value))
    if inputs.mask is not None:
        key = key.masked_fill(inputs.mask[:, None, :, None], 0.0)
    return replace(inputs, key=key, value=value)


def _plan(inputs: AttentionInputs) -> tuple[BranchPlan, ...]:
    """The branches whose rows are tiles."""
    spec = inputs.spec
    if not spec.pattern.rows_at_equal_steps:
        return ()
    plan = make_plan(spec.pattern, inputs.query.shape[1], inputs.length, segment_offset=spec.segment_offset)
    return plan.branches


def _parts(inputs: AttentionInputs) -> Iterator[_RangeRows]:
    """Everything else."""
    spec, (_, heads, length, _) = inputs.spec, inputs.query.shape
    for part in key_ranges(spec.pattern, heads, length, spec.is_causal, spec.segment_offset):
        yield _RangeRows(part, inputs.query.device)


@by_offset
def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """out like the query, and lse (B, H, N)."""
    query = inputs.query
    total, lse = inputs.mixture_of_nothing()
    if query.numel() == 0:
        return torch.empty_like(query), lse
    inputs = _by_query_head(inputs)
    for branch in _plan(inputs):
        for tile in branch.tiles:
            out_tile, lse_tile = _rows(tile, inputs).forward()
            rows, rows_lse = tile_view(total, tile), tile_view(lse, tile)
            merge.merge_(rows, rows_lse, out_tile.view(rows.shape), lse_tile.view(rows_lse.shape))
    for ranges in _parts(inputs):
        at = ranges.at_queries
        rows, rows_lse = total[at], lse[at]
        out_part, lse_part = ranges.of(inputs).forward()
        merge.merge_(rows, rows_lse, out_part.view(rows.shape), lse_part.view(rows_lse.shape))
        total[at], lse[at] = rows, rows_lse
    return torch.empty_like(query).copy_(total), lse


@backward_by_offset
def backward(saved: SavedForward, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """Exact gradients of the joint softmax, by the rule of :mod:`longnet.attention.merge`."""
    inputs, grads = saved.inputs, saved.inputs.empty_gradients()
    if inputs.query.numel() == 0:
        return grads.zeroed()
    grad_bias = None if inputs.bias is None else torch.zeros_like(inputs.bias, dtype=saved.lse.dtype)
    query, out, lse = merge.rows_for_backward(grad_out, grad_lse, inputs.query, saved.out, saved.lse)
    # sum(grad_out * out) of the joint softmax, less what flows in through the lse.
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    group, inputs = inputs.group, replace(_by_query_head(inputs), query=query)
    totals = [torch.zeros_like(x, dtype=lse.dtype) for x in (inputs.query, inputs.key, inputs.value)]
    for branch in _plan(inputs):
        for tile in branch.tiles:
            *parts, by_distance = _rows(tile, inputs).backward(*(_gathered(x, tile) for x in (grad_out, lse, delta)))
            for total, part in zip(totals, parts, strict=True):
                rows = tile_view(total, tile)
                rows.add_(part.view(rows.shape))
            if grad_bias is not None and by_distance is not None:
                # A tile's heads are distinct, so no index occurs twice.
                grad_bias[
                    _bias_heads(tile, query.device), bias_columns(grad_bias, tile.rows, tile.rows, tile.row_step)
                ] += by_distance
    for ranges in _parts(inputs):
        *found, by_distance = ranges.of(inputs).backward(
            *(ranges.queries(x) for x in (grad_out.to(lse.dtype), lse, delta))
        )
        places = (ranges.at_queries, ranges.at_keys, ranges.at_keys)
        for total, at, part in zip(totals, places, found, strict=True):
            # No index occurs twice.
            total[at] += part.unflatten(0, (len(query), -1))
        if grad_bias is not None and by_distance is not None:
            grad_bias[ranges.heads] += by_distance
    for grad, total, shared in zip(grads, totals, (1, group, group), strict=False):
        grad.copy_(sum_heads(total, shared))
    if grad_bias is not None:
        grads.bias.copy_(grad_bias)
    return grads
