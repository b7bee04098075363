"""Calls of attention as backends get them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from longnet.attention.call import AttentionInputs, AttentionSpec
from longnet.geometry import Pattern


def call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> AttentionInputs:
    spec = AttentionSpec(pattern, is_causal, query.shape[-1] ** -0.5 if scale is None else scale)
    return AttentionInputs(query, key, value, mask, bias, spec)


def call_on(device: str, dtype: torch.dtype, has_bias: bool = False) -> AttentionInputs:
    """A small call on a device that need not be there: its tensors hold nothing."""
    with FakeTensorMode():
        x = torch.empty(1, 1, 4, 64, device=device, dtype=dtype)
        return call(x, x, x, Pattern.parse(4, 1), bias=x.new_empty(1, 7) if has_bias else None)
