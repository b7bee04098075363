"""The definition, dense and in float64, on one page: every fast path is compared with this and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def multiplicity(
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    heads: int,
    length: int,
    is_causal: bool,
    head_offsets: str,
) -> Tensor:
    """How often query p of head j sees key k, (H, N, N): once for every branch that selects both in one segment."""
    position = torch.arange(length)
    count = torch.zeros(heads, length, length, dtype=torch.float64)
    for w, r in zip(segment_lengths, dilation_rates, strict=True):
        for head in range(heads):
            offset = head % r if head_offsets == "interleaved" else head // -(-heads // r)
            selected = position % w % r == offset
            same_segment = position[:, None] // w == position[None, :] // w
            count[head] += (selected[:, None] & selected[None, :] & same_segment).double()
    return count.tril() if is_causal else count


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    head_offsets: str = "interleaved",
    score_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of one softmax over the multiset union of keys. ``score_bias`` is (H, N, N), added to the scores."""
    heads, length, dim = query.shape[1:]
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    value = value.repeat_interleave(heads // value.shape[1], dim=1)
    count = multiplicity(segment_lengths, dilation_rates, heads, length, is_causal, head_offsets).expand(
        query.shape[0], -1, -1, -1
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
