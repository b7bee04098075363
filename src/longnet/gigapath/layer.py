"""One layer of the slide encoder, in two halves: attention, and what happens to each token by itself.

Training memory. Of a layer of C channels, fp16 autocast keeps for the backward pass, in bytes per token and channel: x 4 (the
residual stream is float32), its norm 2, q, k, v 6, the attention's result 2; 14 in all, and 4 bytes per token and head. The
second half (inner norm, output projection, feed-forward) is computed again, in chunks of tokens, from x and the attention's
result. Kept, it would add 6 for the inner norm, 4 for x, 4 * (2 + 2 + 4 + 2) for the feed-forward, and dropout's masks.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longnet.gigapath.readout import first_token_weights
from longnet.models.layers import Block

Recompute = Literal["ffn", "block", "none"]
RECOMPUTE: tuple[str, ...] = get_args(Recompute)

# Tokens of the second half at a time: enough to fill any device, few enough for its widest activations not to count.
_CHUNK = 16_384


def run_layer(block: Block, x: Tensor, recompute: Recompute, drop_path: float) -> Tensor:
    """x (B, N, C) through a layer.

    Args:
        recompute: what the backward pass computes again: ``"ffn"`` the second half, ``"block"`` all, ``"none"`` nothing.
        drop_path: probability of leaving out a residual branch of a sample, in training.
    """
    scales = tuple(_drop_path(x, drop_path if block.training else 0.0) for _ in range(2))
    if recompute == "block" and torch.is_grad_enabled():
        return checkpoint(_whole, block, x, scales, use_reentrant=False)
    attended = attend(block, x)
    parts = zip(x.split(_CHUNK, dim=1), attended.split(_CHUNK, dim=1), strict=True)
    if recompute == "ffn" and torch.is_grad_enabled():
        random = block.training and block.dropout.p > 0
        outs = [
            checkpoint(_rest, block, *part, scales, use_reentrant=False, preserve_rng_state=random) for part in parts
        ]
    else:
        outs = [_rest(block, *part, scales) for part in parts]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def run_last_layer(block: Block, x: Tensor, drop_path: float) -> Tensor:
    """x (B, N, C) through the last layer, of whose result only the class token is read: (B, 1, C)."""
    scales = tuple(_drop_path(x, drop_path if block.training else 0.0) for _ in range(2))
    weights, y = class_token_weights(block, x)
    value = block.attention.v_proj(y).unflatten(-1, (block.attention.heads, -1)).transpose(1, 2)
    attended = (weights.to(value.dtype).unsqueeze(2) @ value).transpose(1, 2).flatten(-2)
    return _rest(block, x[:, :1], attended, scales)


def class_token_weights(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    """(what the class token attends to, (B, heads, N), see :mod:`longnet.gigapath.readout`; what the projections read)."""
    attention, y = block.attention, normalised(block, x)
    query, key = (
        rows.unflatten(-1, (attention.heads, attention.head_dim)).transpose(1, 2)
        for rows in (attention.q_proj(y[:, :1]), attention.k_proj(y))
    )
    return first_token_weights(query, key, attention.pattern), y


def normalised(block: Block, x: Tensor) -> Tensor:
    """What the projections read; under autocast cast once, instead of by each of them."""
    y: Tensor = block.attention_norm(x)
    kind = x.device.type
    if y.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return y
    return y.to(torch.get_autocast_dtype(kind))


def attend(block: Block, x: Tensor) -> Tensor:
    """The first half: x (B, N, C) to the heads' results, (B, N, C)."""
    attention, y = block.attention, normalised(block, x)
    q, k, v = (
        projection(y).unflatten(-1, (attention.heads, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    out = attention.function(q, k, v, attention.pattern, is_causal=False, backend=attention.backend)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).flatten(-2)


def _whole(block: Block, x: Tensor, scales: tuple[Tensor | None, ...]) -> Tensor:
    attended = attend(block, x)
    parts = zip(x.split(_CHUNK, dim=1), attended.split(_CHUNK, dim=1), strict=True)
    return torch.cat([_rest(block, *part, scales) for part in parts], dim=1)


def _rest(block: Block, x: Tensor, attended: Tensor, scales: tuple[Tensor | None, ...]) -> Tensor:
    attention = block.attention
    assert attention.sub_norm is not None
    branch = block.dropout(attention.out_proj(attention.sub_norm(attended)))
    x = x + (branch if scales[0] is None else branch * scales[0])
    branch = block.dropout(block.feed_forward(block.feed_forward_norm(x)))
    return x + (branch if scales[1] is None else branch * scales[1])


def _drop_path(x: Tensor, probability: float) -> Tensor | None:
    """0 or 1 / (1 - p) for every sample, (B, 1, 1); None where nothing is dropped."""
    if probability == 0.0:
        return None
    kept = torch.rand(x.shape[0], 1, 1, device=x.device) >= probability
    return kept.to(x.dtype) / (1.0 - probability)
