"""The layers of the slide encoder: attention, and what happens to each token by itself before it and after it.

Training memory. Of a layer of C channels, fp16 autocast keeps for the backward pass, in bytes per token and channel: x 4 (the
residual stream is float32), its norm 2, q, k, v 6, the attention's result 2; 14 in all, and 4 bytes per token and head. What
comes after attention (inner norm, output projection, feed-forward) is computed again, in chunks of tokens, from x and the
attention's result. To keep what its matrix products give adds 2 for the output projection and 4 * 2 for ``fc1``; to keep
everything 6 for the inner norm, 4 for x, 4 * (2 + 2 + 4 + 2) for the feed-forward, and dropout's masks, 2; compiled layers keep
the masks always. On a GPU these norms' results are not kept, see :mod:`longnet.models.normed`: 12 in all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from longnet.compat.attention import torchscale_pattern_attention
from longnet.fused import can_draw, keep_masks
from longnet.gigapath.readout import first_token_weights
from longnet.models.layers import Block, feed_residual
from longnet.models.normed import normalise, project_normed, project_residual

Recompute = Literal["ffn", "block", "elementwise", "none"]
RECOMPUTE: tuple[str, ...] = get_args(Recompute)

# Tokens at a time after attention: enough to fill any device, few enough for its widest activations not to count.
_CHUNK = 16_384

Scales = tuple[Tensor | None, ...]
Masks = tuple[Tensor | None, Tensor | None]
Pool = Callable[[Tensor], Tensor]


def run_layers(
    blocks: Sequence[Block],
    x: Tensor,
    drop_paths: Sequence[float],
    recompute: Recompute,
    pool: Pool | None = None,
    read: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """x (B, N, C) through layers, and what ``pool`` makes of each one's result.

    Args:
        read: the positions that the first token attends to in the layer that follows, see
            :func:`longnet.gigapath.readout.read_by_first_token`, where the result is to have no others; None for all.
        drop_paths: probability of leaving out a residual branch of a sample in training, by layer.
        recompute: what the backward pass computes again: ``"ffn"`` all after attention, ``"block"`` all, ``"elementwise"``
            what is no matrix product, ``"none"`` nothing.
    """
    pooled = []
    for number, (block, drop_path) in enumerate(zip(blocks, drop_paths, strict=True), 1):
        scales = _scales(block, x, drop_path)
        wanted = read if number == len(blocks) else None
        kept = _masks(block, x, x.shape[1] if wanted is None else len(wanted))
        if recompute == "block" and torch.is_grad_enabled():
            x = checkpoint(_layer, block, x, scales, kept, "none", wanted, use_reentrant=False)
        else:
            x = _layer(block, x, scales, kept, recompute, wanted)
        if pool is not None:
            pooled.append(pool(x))
    return x, pooled


def run_last_layer(block: Block, x: Tensor, times: Tensor, drop_path: float) -> Tensor:
    """x (B, N, C) through the last layer, of whose result only the class token is read: (B, 1, C).

    Args:
        times: see :func:`class_token_weights`.
    """
    scales = _scales(block, x, drop_path)
    weights, y = class_token_weights(block, x, times)
    value = block.attention.v_proj(y).unflatten(-1, (block.attention.heads, -1)).transpose(1, 2)
    attended = (weights.to(value.dtype).unsqueeze(2) @ value).transpose(1, 2).flatten(-2)
    return _after(block, x[:, :1], attended, scales)


def class_token_weights(block: Block, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """(what the class token attends to, (B, heads, N), see :mod:`longnet.gigapath.readout`; what the projections read).

    Args:
        times: :func:`longnet.gigapath.readout.log_times` of the tokens that x has.
    """
    attention, y = block.attention, normalise(block.attention_norm, x)
    query, key = (
        rows.unflatten(-1, (attention.heads, attention.head_dim)).transpose(1, 2)
        for rows in (attention.q_proj(y[:, :1]), attention.k_proj(y))
    )
    return first_token_weights(query, key, times), y


def _layer(block: Block, x: Tensor, scales: Scales, kept: Masks, recompute: Recompute, read: Tensor | None) -> Tensor:
    attention = block.attention
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    x, projected = project_residual(block.attention_norm, projections, x)
    q, k, v = (rows.unflatten(-1, (attention.heads, attention.head_dim)).transpose(1, 2) for rows in projected)
    some = {"read_by_first": True} if read is not None and attention.function is torchscale_pattern_attention else {}
    out = attention.function(q, k, v, attention.pattern, is_causal=False, backend=attention.backend, **some)
    assert isinstance(out, Tensor)
    attended = out.transpose(1, 2).flatten(-2)
    if read is not None:
        x, attended = x.index_select(1, read), attended.index_select(1, read)
    after = _after
    if recompute in ("ffn", "elementwise") and torch.is_grad_enabled():
        options: dict[str, Any] = {} if recompute == "ffn" else {"context_fn": _keep_products}
        random = block.training and block.dropout.p > 0 and kept[0] is None
        after = partial(checkpoint, _after, use_reentrant=False, preserve_rng_state=random, **options)
    if torch.compiler.is_compiling():
        # The number of chunks would be part of what is compiled.
        return after(block, x, attended, scales, kept)
    parts = zip(x.split(_CHUNK, dim=1), attended.split(_CHUNK, dim=1), strict=True)
    outs = [after(block, *part, scales) for part in parts]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _after(block: Block, x: Tensor, attended: Tensor, scales: Scales, kept: Masks = (None, None)) -> Tensor:
    attention = block.attention
    assert attention.sub_norm is not None
    branch = _dropout(block, project_normed(attention.sub_norm, [attention.out_proj], attended)[0], kept[0])
    x = x + (branch if scales[0] is None else branch * scales[0])
    x, fed = feed_residual(block.feed_forward, block.feed_forward_norm, x)
    branch = _dropout(block, fed, kept[1])
    return x + (branch if scales[1] is None else branch * scales[1])


def _masks(block: Block, x: Tensor, tokens: int) -> Masks:
    """What dropout keeps of so many tokens of each of the two branches; None where it is drawn when it is needed.

    torch 2.11 cannot compile what is drawn inside of what is computed again: it loses sizes.
    """
    if not (torch.compiler.is_compiling() and block.training and block.dropout.p > 0):
        return None, None
    shape = (2, x.shape[0], tokens, x.shape[2])
    drawn = can_draw(x.device)
    kept = (
        keep_masks(shape, block.dropout.p, x.device) if drawn else torch.rand(shape, device=x.device) >= block.dropout.p
    )
    return kept[0], kept[1]


def _dropout(block: Block, branch: Tensor, kept: Tensor | None) -> Tensor:
    """The block's dropout, of a mask that is there already or else drawn here."""
    if kept is None:
        dropped: Tensor = block.dropout(branch)
        return dropped
    return branch * kept * (1.0 / (1.0 - block.dropout.p)) if block.dropout.p < 1.0 else branch * 0.0


_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


def _policy(_: Any, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


_keep_products = partial(create_selective_checkpoint_contexts, _policy)


def _scales(block: Block, x: Tensor, drop_path: float) -> Scales:
    """For each of the two branches 0 or 1 / (1 - p) for every sample, (B, 1, 1); None where nothing is dropped."""
    if drop_path == 0.0 or not block.training:
        return None, None
    kept = torch.rand(2, x.shape[0], 1, 1, device=x.device) >= drop_path
    first, second = (kept.to(x.dtype) / (1.0 - drop_path)).unbind()
    return first, second
