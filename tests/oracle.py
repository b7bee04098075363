"""The definition, dense and in float64, on one page: every fast path is compared with this and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def multiplicity(
    segment_lengths: Sequence[int | None],
    dilation_rates: Sequence[int],
    heads: int,
    length: int,
    is_causal: bool,
    head_offsets: str,
    *,
    window: int | None = None,
    dilated_queries: bool = True,
    dilation_block: int = 1,
    segment_offset: int = 0,
    kv_heads: int = 1,
) -> Tensor:
    """How often query p of head j sees key k, (H, N, N): once for every branch that has both, and once for the window."""
    position = torch.arange(length)
    on_grid = position + segment_offset
    count = torch.zeros(heads, length, length, dtype=torch.float64)
    for w, r in zip(segment_lengths, dilation_rates, strict=True):
        segment = torch.zeros_like(position) if w is None else on_grid.div(w, rounding_mode="floor")
        local = on_grid if w is None else on_grid % w
        for head in range(heads):
            offset = {
                "interleaved": head % r,
                "blocked": head // -(-heads // r),
                "grouped": head // (heads // kv_heads) % r,
            }[head_offsets]
            selected = local.div(dilation_block, rounding_mode="floor") % r == offset
            queries = selected if dilated_queries else torch.ones_like(selected)
            same_segment = segment[:, None] == segment[None, :]
            count[head] += (queries[:, None] & selected[None, :] & same_segment).double()
    if window is not None:
        count += ((position[:, None] - position).abs() < window).double()
    return count.tril() if is_causal else count


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int | None],
    dilation_rates: Sequence[int],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    head_offsets: str = "interleaved",
    score_bias: Tensor | None = None,
    segment_offset: int | Tensor = 0,
    **beyond: object,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of one softmax over the multiset union of keys. ``score_bias`` is (H, N, N), added to the scores."""
    batch, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    key = key.repeat_interleave(heads // kv_heads, dim=1)
    value = value.repeat_interleave(heads // kv_heads, dim=1)
    offsets = segment_offset.tolist() if isinstance(segment_offset, Tensor) else [segment_offset] * batch
    of_offset = {
        offset: multiplicity(
            segment_lengths, dilation_rates, heads, length, is_causal, head_offsets,
            segment_offset=offset, kv_heads=kv_heads, **beyond,
        )
        for offset in set(offsets)
    }  # fmt: skip
    count = (
        torch.stack([of_offset[offset] for offset in offsets]) if batch else query.new_zeros(0, heads, length, length)
    )
    if key_padding_mask is not None:
        count = count.masked_fill(key_padding_mask[:, None, None, :], 0.0)
    scores = query @ key.transpose(-1, -2) * (dim**-0.5 if scale is None else scale)
    if score_bias is not None:
        scores = scores + score_bias
    # A key seen twice counts twice: its log-multiplicity is added to its score.
    scores = (scores + count.log()).masked_fill(count == 0, -torch.inf)
    empty = (count == 0).all(-1)
    lse = scores.masked_fill(empty[..., None], 0.0).logsumexp(-1).masked_fill(empty, -torch.inf)
    weights = (scores - lse.masked_fill(empty, 0.0)[..., None]).exp()
    return weights @ value, lse
