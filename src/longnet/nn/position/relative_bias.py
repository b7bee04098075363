"""T5's relative position bias, one learned table per head, from the true distance in tokens.

Source: "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", arXiv 1910.10683, section 2.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def relative_buckets(distance: Tensor, *, is_causal: bool, num_buckets: int, max_distance: int) -> Tensor:
    """The bucket of every ``distance`` = key position - query position, int64 of the same shape.

    Half the buckets are exact small distances, the rest grow logarithmically up to ``max_distance`` and hold everything
    beyond. Bidirectional attention spends half of all buckets on keys after the query; causal attention none.
    """
    offset = torch.zeros_like(distance)
    if is_causal:
        distance = -distance.clamp(max=0)
    else:
        num_buckets //= 2
        offset = (distance > 0) * num_buckets
        distance = distance.abs()
    exact = num_buckets // 2
    # T5 computes the logarithm in float32; its checkpoints expect the same rounding at bucket edges.
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


class RelativeBias(nn.Module):
    """A learned bias by head and distance bucket, added to the attention scores.

    Args:
        heads: H query heads.
        num_buckets: rows of the table, even, at least 4.
        max_distance: tokens, past which all
            distances share the last bucket, above ``num_buckets / 2``.

    Raises:
        ValueError: values out of those ranges.
    """

    def __init__(
        self,
        heads: int,
        *,
        is_causal: bool,
        num_buckets: int = 32,
        max_distance: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_buckets < 4 or num_buckets % 2:
            raise ValueError(f"num_buckets={num_buckets}: expected an even number of at least 4")
        if max_distance <= num_buckets // 2:
            raise ValueError(f"max_distance={max_distance}: expected more than num_buckets / 2 = {num_buckets // 2}")
        self.is_causal, self.num_buckets, self.max_distance = is_causal, num_buckets, max_distance
        self.weight = nn.Parameter(torch.empty(num_buckets, heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, span: int) -> Tensor:
        """(H, 2 * span - 1): the bias at distances ``-(span - 1) .. span - 1``."""
        distance = torch.arange(1 - span, span, device=self.weight.device)
        buckets = relative_buckets(
            distance, is_causal=self.is_causal, num_buckets=self.num_buckets, max_distance=self.max_distance
        )
        return self.weight[buckets].t()
