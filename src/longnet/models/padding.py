"""Rows that are padded on the left, read as what they are alone: from their first real token on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from longnet.attention import DilatedAttention
from longnet.attention.padding import leading_padding


class RowsFromStart(NamedTuple):
    """The order of tokens that moves each row's leading padding behind its end, (B, N) int64, and the order back.

    A row padded on the left then is the same row padded on the right: its positions and segments are those that it has alone,
    and the kernels are those of any call.
    """

    order: Tensor
    back: Tensor

    @classmethod
    def of(cls, key_padding_mask: Tensor) -> RowsFromStart | None:
        """None where the mask is seen to begin no row with padding; a device's is not looked at, so as not to wait for it."""
        length = key_padding_mask.shape[1]
        if length == 0:
            return None
        may_look = type(key_padding_mask) is Tensor and key_padding_mask.device.type == "cpu"
        if may_look and not torch.compiler.is_compiling() and not key_padding_mask[:, 0].any():
            return None
        leading = leading_padding(key_padding_mask)[:, None]
        place = torch.arange(length, device=key_padding_mask.device)
        return cls((place + leading) % length, (place - leading) % length)

    def moved(self, x: Tensor) -> Tensor:
        """Tokens, a mask (B, N) or embeddings (B, N, C), each row from its first real token on."""
        return _in_order(x, self.order)

    def moved_back(self, x: Tensor) -> Tensor:
        """Results (B, N, C) where their tokens were."""
        return _in_order(x, self.back)


def rows_from_start(model: nn.Module, is_causal: bool, key_padding_mask: Tensor | None) -> RowsFromStart | None:
    """The order in which a decoder's blocks read rows that are padded on the left; None where no row is seen to be.

    Leading padding is no part of a row, except where ranks share rows and in torchscale's definition.
    """
    if key_padding_mask is None or not is_causal:
        return None
    attentions = [getattr(block, "attention", None) for block in model.blocks]  # type: ignore[union-attr]
    if not all(
        isinstance(one, DilatedAttention) and one.distributed is False and one.definition.takes_all_options
        for one in attentions
    ):
        return None
    return RowsFromStart.of(key_padding_mask)


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    batch, length = x.shape[:2]
    rows = torch.arange(batch, device=order.device)[:, None] * length
    return x.flatten(0, 1).index_select(0, (order + rows).flatten().to(x.device)).unflatten(0, (batch, length))
