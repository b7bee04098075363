"""The arguments of ``DilatedAttention``'s constructor, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longnet.attention.call import check_segment_offset
from longnet.checks import check_ints, check_number
from longnet.geometry import Pattern


def parse_pattern(
    segment_size: int | Sequence[int | None] | None, dilation_rate: int | Sequence[int], **options: Any
) -> Pattern:
    try:
        return Pattern.compose(segment_size, dilation_rate, **options)
    except (TypeError, ValueError) as error:
        # Name the arguments as this constructor calls them.
        said = str(error).replace("segment_lengths", "segment_size").replace("dilation_rates", "dilation_rate")
        raise type(error)(said) from None


def checked_offset(segment_offset: int) -> int:
    if isinstance(segment_offset, Tensor):
        raise TypeError("segment_offset is a tensor: expected an int, or the tensor in the call itself")
    check_segment_offset(segment_offset, 0, torch.device("cpu"), "the CPU")
    return segment_offset


def check_sizes(dim: int, heads: int, kv_heads: int, dropout: float) -> None:
    check_ints(1, dim=dim, heads=heads, kv_heads=kv_heads)
    if dim % heads:
        raise ValueError(f"dim={dim} is not divisible by heads={heads}")
    if heads % kv_heads:
        raise ValueError(f"heads={heads} is not divisible by kv_heads={kv_heads}")
    check_number("dropout", dropout)
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout={dropout}: expected a probability in [0, 1]")


def check_sub_norm(sub_norm: str | None, causal: bool, distributed: Any) -> None:
    if sub_norm != "batch":
        return
    if causal:
        raise ValueError(
            "sub_norm='batch' with causal=True: batch statistics run over the whole sequence, so every token would "
            "see later ones; expected 'layer' or 'rms'"
        )
    if distributed is not False:
        raise ValueError(
            "sub_norm='batch' with distributed: batch statistics run over the whole sequence, and a rank holds "
            "only its shard; expected 'layer' or 'rms'"
        )
