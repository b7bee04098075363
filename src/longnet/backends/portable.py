"""The portable backend: plain torch operations, for every device and for what faster backends refuse.

Scores exist only for a bounded number of (query, key) pairs at a time and are recomputed in the backward pass, so memory
is linear in the length. Everything is computed in float32 (float64 for float64 inputs), whatever the inputs' dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from longnet import mixing
from longnet.backends.views import padding_view, repeat_heads, sum_heads, tile_view
from longnet.call import AttentionInputs, Gradients, SavedForward, lse_dtype
from longnet.geometry import Tile, make_plan

# How many scores exist at a time. Large enough to keep a device busy, 64 MiB in float32.
_SCORES = 1 << 24


def unsupported_reason(inputs: AttentionInputs) -> str | None:
    """Why this backend cannot run these inputs, or None when it can."""
    dtype = inputs.query.dtype
    if not dtype.is_floating_point or torch.finfo(dtype).bits < 16:
        return f"it takes float64, float32, bfloat16 and float16, not {dtype}"
    return None


def _chunks(tile: Tile, batch: int) -> Iterator[tuple[slice, slice]]:
    """(groups, query rows): every (batch, segment, offset, head) is a group of ``tile.rows`` rows."""
    groups = batch * tile.segments * tile.offsets * tile.heads
    step = max(1, _SCORES // (tile.rows * tile.rows))
    height = tile.rows if step > 1 else max(1, min(tile.rows, _SCORES // tile.rows))
    for first in range(0, groups, step):
        for top in range(0, tile.rows, height):
            yield slice(first, min(groups, first + step)), slice(top, min(tile.rows, top + height))


class _Scores:
    """The masked scores of a tile, chunk by chunk. Keys past the last query row of a causal chunk are left out."""

    def __init__(self, tile: Tile, inputs: AttentionInputs) -> None:
        self.tile, self.spec = tile, inputs.spec
        self.shape = (inputs.query.shape[0], *tile.shape)
        self.q, self.k, self.v = (self.rows(x) for x in (inputs.query, inputs.key, inputs.value))
        self.bias = None if inputs.bias is None else self._bias_by_distance(inputs.bias)
        self.padded = None
        if inputs.mask is not None:
            self.padded = padding_view(inputs.mask, tile).expand(self.shape).reshape(-1, tile.rows)

    def rows(self, x: Tensor) -> Tensor:
        """The tile's rows of (B, H, N, ...), gathered as (groups, rows, ...) in the accumulation dtype."""
        return tile_view(x, self.tile).to(lse_dtype(x.dtype)).flatten(0, 3)

    def keys(self, queries: slice) -> slice:
        return slice(0, queries.stop if self.spec.is_causal else self.tile.rows)

    def heads(self, groups: slice) -> Tensor:
        """Which of the tile's (offset, head) pairs each group is."""
        pairs = self.tile.offsets * self.tile.heads
        return torch.arange(groups.start, groups.stop, device=self.q.device) % pairs

    def _bias_by_distance(self, bias: Tensor) -> Tensor:
        """(pairs of (offset, head), 2 rows - 1): the bias at key row minus query row = -(rows-1) .. rows-1."""
        tile, centre = self.tile, bias.shape[-1] // 2
        span = (tile.rows - 1) * tile.row_step
        return bias[self.head_numbers(), centre - span : centre + span + 1 : tile.row_step].to(self.q.dtype)

    def head_numbers(self) -> Tensor:
        tile, device = self.tile, self.q.device
        by_offset = torch.arange(tile.offsets, device=device)[:, None] * tile.head_step_per_offset
        return (tile.head + by_offset + torch.arange(tile.heads, device=device) * tile.head_step).flatten()

    def __call__(self, groups: slice, queries: slice) -> Tensor:
        keys = self.keys(queries)
        scores = self.q[groups, queries] @ self.k[groups, keys].transpose(-1, -2) * self.spec.scale
        if self.bias is not None:
            # Row a of the window is the bias at distances (0 - a) .. (keys - 1 - a).
            by_pair = self.bias[:, self.tile.rows - queries.stop : self.tile.rows - 1 - queries.start + keys.stop]
            scores += by_pair.unfold(-1, keys.stop, 1).flip(1)[self.heads(groups)]
        if self.padded is not None:
            scores.masked_fill_(self.padded[groups, None, keys], -torch.inf)
        if self.spec.is_causal:
            row = torch.arange(queries.start, queries.stop, device=scores.device)
            scores.masked_fill_(torch.arange(keys.stop, device=scores.device) > row[:, None], -torch.inf)
        return scores

    def bias_gradient_(self, grad_bias: Tensor, grad_scores: Tensor, groups: slice, queries: slice) -> None:
        """Add a chunk's score gradients (groups, queries, keys) to (H, 2L - 1), by head and distance."""
        tile, height, width = self.tile, *grad_scores.shape[1:]
        pairs = tile.offsets * tile.heads
        per_pair = grad_scores.new_zeros(pairs, height, width).index_add_(0, self.heads(groups), grad_scores)
        # Skewing rows by one each turns diagonals of equal distance into columns, which then add up without atomics.
        skewed = F.pad(per_pair.flip(1), (0, height)).flatten(1)[:, :-height]
        by_distance = skewed.unflatten(1, (height, width + height - 1)).sum(1)
        first = grad_bias.shape[-1] // 2 - (queries.stop - 1) * tile.row_step
        last = first + (by_distance.shape[1] - 1) * tile.row_step + 1
        # A tile's heads are distinct, so no index occurs twice.
        grad_bias[self.head_numbers(), first : last : tile.row_step] += by_distance


def _with_head_of_its_own(x: Tensor, inputs: AttentionInputs) -> Tensor:
    """Keys or values by query head, 0 where they are padding: a NaN there must not reach 0 * value."""
    x = repeat_heads(x, inputs.group)
    return x if inputs.mask is None else x.masked_fill(inputs.mask[:, None, :, None], 0.0)


def _by_query_head(inputs: AttentionInputs) -> AttentionInputs:
    key, value = (_with_head_of_its_own(x, inputs) for x in (inputs.key, inputs.value))
    return replace(inputs, key=key, value=value)


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """out like the query, and lse (B, H, N)."""
    query = inputs.query
    batch, heads, length, _ = query.shape
    lse = query.new_full(query.shape[:-1], -torch.inf, dtype=lse_dtype(query.dtype))
    total = torch.zeros_like(query, dtype=lse.dtype)
    if query.numel() == 0:
        return torch.empty_like(query), lse
    inputs = _by_query_head(inputs)
    for branch in make_plan(inputs.spec.pattern, heads, length).branches:
        for tile in branch.tiles:
            scores = _Scores(tile, inputs)
            out_tile, lse_tile = torch.empty_like(scores.v), scores.v.new_empty(scores.v.shape[:-1])
            for groups, queries in _chunks(tile, batch):
                chunk = scores(groups, queries)
                chunk_lse = chunk.logsumexp(-1)
                chunk.sub_(mixing.lse_for_backward(chunk_lse).unsqueeze(-1)).exp_()
                out_tile[groups, queries] = chunk @ scores.v[groups, scores.keys(queries)]
                lse_tile[groups, queries] = chunk_lse
            shape = scores.shape
            mixing.merge_(
                tile_view(total, tile), tile_view(lse, tile), out_tile.unflatten(0, shape[:-1]), lse_tile.view(shape)
            )
    return torch.empty_like(query).copy_(total), lse


def backward(saved: SavedForward, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """Exact gradients of the joint softmax, by the rule of :mod:`longnet.mixing`."""
    inputs, grads = saved.inputs, saved.inputs.empty_gradients()
    batch, heads, length, _ = inputs.query.shape
    if inputs.query.numel() == 0:
        return grads.zeroed()
    grad_bias = None if inputs.bias is None else torch.zeros_like(inputs.bias, dtype=saved.lse.dtype)
    group = inputs.group
    query, out, lse = mixing.rows_for_backward(grad_out, grad_lse, inputs.query, saved.out, saved.lse)
    inputs = replace(_by_query_head(inputs), query=query)
    totals = [torch.zeros_like(x, dtype=lse.dtype) for x in (inputs.query, inputs.key, inputs.value)]
    # sum(grad_out * out) of the joint softmax, less what flows in through the lse.
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    scale = inputs.spec.scale
    for branch in make_plan(inputs.spec.pattern, heads, length).branches:
        for tile in branch.tiles:
            scores = _Scores(tile, inputs)
            q, k, v, g = scores.q, scores.k, scores.v, scores.rows(grad_out)
            tile_lse, tile_delta = scores.rows(lse).unsqueeze(-1), scores.rows(delta).unsqueeze(-1)
            grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            for groups, queries in _chunks(tile, batch):
                keys = scores.keys(queries)
                probabilities = scores(groups, queries).sub_(tile_lse[groups, queries]).exp_()
                grad_v[groups, keys] += probabilities.transpose(-1, -2) @ g[groups, queries]
                grad_scores = g[groups, queries] @ v[groups, keys].transpose(-1, -2)
                grad_scores.sub_(tile_delta[groups, queries]).mul_(probabilities)
                grad_q[groups, queries] = grad_scores @ k[groups, keys] * scale
                grad_k[groups, keys] += grad_scores.transpose(-1, -2) @ q[groups, queries] * scale
                if grad_bias is not None:
                    scores.bias_gradient_(grad_bias, grad_scores, groups, queries)
            for total, part in zip(totals, (grad_q, grad_k, grad_v), strict=True):
                tile_view(total, tile).add_(part.unflatten(0, scores.shape[:-1]))
    for grad, total, shared in zip(grads, totals, (1, group, group), strict=False):
        grad.copy_(sum_heads(total, shared))
    if grad_bias is not None:
        grads.bias.copy_(grad_bias)
    return grads
