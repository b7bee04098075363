"""Keys that also say what the token before was."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def second_half(key: Tensor) -> Tensor:
    """The channels that :func:`shift_keys` takes from the token before: the last ``D // 2``."""
    return key[..., key.shape[-1] - key.shape[-1] // 2 :]


def shift_keys(
    key: Tensor,
    *,
    before: Tensor | None = None,
    padding: Tensor | None = None,
    in_document: Tensor | None = None,
) -> Tensor:
    """Give each key the second half of its channels from the token before: the partial key offset.

    A query can then find a token by what stood before it, in one layer: an induction head needs no second one. Source: the
    "partial key offset" of the modded-nanogpt speed runs; "Induction heads", Olsson et al. 2022 (arXiv 2209.11895).

    Args:
        key: (B, Hk, N, D), before its positions are encoded. The second half are the last ``D // 2`` channels.
        before: (B, Hk, 1, D // 2), that half of the token before the first: of a stream or a sequence over ranks. None: there
            is no such token.
        padding: (B, N) bool, True where a token is padding.
        in_document: (N,) int64, each token's place in its document, where several are packed into one row.

    Returns:
        (B, Hk, N, D). The second half is 0 where no token stands before: at the first of a sequence or document, and after a
        padded one.
    """
    half = second_half(key)
    if before is None:
        shifted = F.pad(half, (0, 0, 1, 0))[:, :, :-1]
    else:
        shifted = torch.cat((before.to(half.dtype), half), dim=2)[:, :, :-1]
    none_before = None if padding is None else F.pad(padding, (1, 0))[:, :-1]
    if in_document is not None:
        first = (in_document == 0)[None]
        none_before = first if none_before is None else none_before | first
    if none_before is not None:
        shifted = shifted.masked_fill(none_before[:, None, :, None], 0.0)
    return torch.cat((key[..., : key.shape[-1] - half.shape[-1]], shifted), dim=-1)
