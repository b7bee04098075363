"""Dilated attention in elementary operations, for ONNX, which knows no operator of ours. Forward only, for a fixed shape.

Rows are gathered by computed indices instead of strided views, and nothing is written in place. The scores of a tile exist
all at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from longnet.attention.backends.views import repeat_heads
from longnet.attention.call import AttentionInputs, lse_dtype
from longnet.geometry import Tile, make_plan

Run = Callable[[AttentionInputs], tuple[Tensor, Tensor]]


def exportable(run: Run) -> Run:
    """A backend's ``run``, and :func:`decompose` instead while ``torch.onnx.export`` (``dynamo=True``) makes its graph."""

    @wraps(run)
    def chosen(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        exporting = torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
        return decompose(inputs) if exporting else run(inputs)

    return chosen


def decompose(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """(out, lse) of one softmax over the multiset union of the branches' keys (arXiv 2307.02486, equations 10 and 11).

    Raises:
        ValueError: a shape that is not fixed while a graph is made.
    """
    query, key, value, mask, *_ = inputs.tensors
    if (beyond := inputs.beyond_paper) is not None:
        raise ValueError(f"{beyond} in an ONNX graph: expected what LongNet's paper has")
    if not all(type(size) is int for size in query.shape):
        raise ValueError(
            f"query has shape {tuple(query.shape)}: an ONNX graph of dilated attention is for one batch size and one length; "
            "expected no dynamic_shapes, and inputs that are padded to the exported length"
        )
    heads, length, dim = query.shape[1:]
    kind, group = lse_dtype(query.dtype), inputs.group
    q, k, v = (x.to(kind).flatten(1, 2) for x in (query, repeat_heads(key, group), repeat_heads(value, group)))
    padded = None if mask is None else mask[:, None].expand(-1, heads, -1).flatten(1)
    if padded is not None:
        v = v.masked_fill(padded[..., None], 0.0)
    outs, lses = [], []
    for branch in make_plan(inputs.spec.pattern, heads, length).branches:
        # Each tile's rows, then one for the positions that no tile holds.
        parts = [_tile(tile, inputs, (q, k, v), padded) for tile in branch.tiles]
        out = torch.cat([*(part[0] for part in parts), q.new_zeros(q.shape[0], 1, dim)], 1)
        lse = torch.cat([*(part[1] for part in parts), q.new_full((q.shape[0], 1), -torch.inf)], 1)
        rows = torch.cat([part[2] for part in parts])
        last = torch.full((heads * length,), len(rows), device=q.device)
        place = last.scatter(0, rows, torch.arange(len(rows), device=q.device))
        outs.append(out.index_select(1, place))
        lses.append(lse.index_select(1, place))
    every = torch.stack(lses)
    top = _finite(every.amax(0))
    weights = (every - top).exp()
    total = weights.sum(0)
    out = (torch.stack(outs) * weights[..., None]).sum(0) / total.masked_fill(total == 0, 1.0)[..., None]
    return out.view(query.shape).to(query.dtype), (top + total.log()).view(query.shape[:-1])


def _tile(
    tile: Tile, inputs: AttentionInputs, flat: tuple[Tensor, Tensor, Tensor], padded: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A tile's out (B, rows of all groups, D) and lse, and where its rows are among the (head, position) pairs.

    Args:
        flat: q, k and v, (B, H * N, D).
        padded: (B, H * N) or None.
    """
    length, bias, spec, device = inputs.length, inputs.bias, inputs.spec, flat[0].device
    index = torch.full((), tile.origin(length, 1), device=device)
    for size, step in zip(tile.shape, tile.strides(length, 1), strict=True):
        index = index[..., None] + torch.arange(size, device=device) * step
    rows = index.flatten()
    shape = (flat[0].shape[0], *tile.shape)
    q, k, v = (x.index_select(1, rows).view(*shape, -1) for x in flat)
    scores = q @ k.transpose(-1, -2) * spec.scale
    distance = torch.arange(tile.rows, device=device) - torch.arange(tile.rows, device=device)[:, None]
    if bias is not None:
        head = index[0, :, :, 0] // length
        by_head = bias.to(scores.dtype).index_select(0, head.flatten()).unflatten(0, head.shape)
        columns = (distance * tile.row_step + bias.shape[-1] // 2).flatten()
        scores = scores + by_head.index_select(-1, columns).unflatten(-1, distance.shape)
    if padded is not None:
        scores = scores.masked_fill(padded.index_select(1, rows).view(*shape)[..., None, :], -torch.inf)
    if spec.is_causal:
        scores = scores.masked_fill(distance > 0, -torch.inf)
    top = _finite(scores.amax(-1, keepdim=True))
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    out = weights @ v / total.masked_fill(total == 0, 1.0)
    return out.flatten(1, 4), (top + total.log()).flatten(1), rows


def _finite(top: Tensor) -> Tensor:
    """A row max that may be subtracted: 0 where every score is -inf."""
    return top.masked_fill(top == -torch.inf, 0.0)
