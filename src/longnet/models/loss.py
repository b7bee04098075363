"""Cross-entropy over positions in chunks, so that the logits of a long sequence are never held at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits at one time by default, 64 MiB in float32, and the least positions: small chunks keep the host busy and not a GPU.
_LOGITS, _LEAST = 1 << 24, 4096


def positions_at_once(loss_chunk: int | None, vocab_size: int) -> int:
    """How many positions' logits a loss holds: ``loss_chunk`` of a config, or what None stands for."""
    return max(_LEAST, _LOGITS // vocab_size) if loss_chunk is None else loss_chunk


def chunked_cross_entropy(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, chunk: int, ignore_index: int = -100
) -> Tensor:
    """Negative log-likelihood of every target, in nats.

    Args:
        head: hidden states (n, C) to logits (n, V); it runs again in the backward pass.
        hidden: (M, C) hidden states.
        targets: (M,) int64 target ids, or ``ignore_index`` where the loss is 0.
        chunk: most positions whose logits exist at one time.

    Returns:
        (M,) losses, float32 (float64 for float64 logits).
    """

    def chunk_losses(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction="none", ignore_index=ignore_index)

    # split, not slices: each slice's gradient would be a tensor of the full length, chunk by chunk.
    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    if torch.is_grad_enabled():
        losses = [checkpoint(chunk_losses, *part, use_reentrant=False) for part in parts]
    else:
        losses = [chunk_losses(*part) for part in parts]
    return torch.cat(losses)
