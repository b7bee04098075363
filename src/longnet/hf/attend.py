"""The attention function that dilated models of Hugging Face call, in transformers' ``AttentionInterface``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from longnet.attention.functional import pattern_attention
from longnet.attention.padding import leading_padding, warn_moved_rows
from longnet.hf import masks
from longnet.hf.bounded import bounded_layer
from longnet.hf.layers import ATTRIBUTE, NAME, Dilation
from longnet.hf.transformers_internals import attend_by, attends_causally, refuse_changed_scores


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """query (B, H, T, D), key and value (B, Hk, S, D), the last T of S positions being the queries', to (B, T, H, D).

    Raises:
        ValueError: what the call asks for and dilated attention cannot do.
    """
    own: Dilation | None = getattr(module, ATTRIBUTE, None)
    if own is None:
        raise ValueError(
            f"{type(module).__name__} is set to attn_implementation={NAME!r} without a pattern (or shares its config with a "
            "model that has one): expected longnet.hf.apply(model, segment_lengths=..., dilation_rates=...)"
        )
    if attention_mask is not None and (attention_mask.dim() != 2 or attention_mask.dtype != torch.int64):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)} and dtype {attention_mask.dtype} in a dilated model: "
            "expected (B, S), 0 where a key is padding; a mask of scores (4-D) cannot be honoured"
        )
    causal = attends_causally(module, is_causal)
    length, keys = query.shape[2], key.shape[2]
    layer = bounded_layer(key)
    mask, has_past = attention_mask, layer is not None or keys != length
    for positions in (options.get("position_ids"), masks.positions_of(options, query.shape[0], length)):
        mask = masks.documents(mask, positions, length, has_past=has_past)
    if own.pattern is None:
        packed = mask is not None and masks.packed_bounds(mask) is not None
        if mask is not None and own.window is not None:
            # Its cache may keep fewer keys than those of other layers.
            mask = mask[:, -keys:]
        options |= {"dropout": dropout, "scaling": scaling}
        return attend_by(own.original, module, query, key, value, mask, causal, packed, own.window, **options)
    if dropout:
        raise ValueError(
            f"attention dropout of {dropout} in training: flash kernels would have to agree on it; expected model.eval(), "
            "or 0 in the model's config (attention_dropout, attn_pdrop or attention_probs_dropout_prob)"
        )
    if own.had_window:
        options.pop("sliding_window", None)
    refuse_changed_scores(module, options)
    # Values may be narrower or wider than queries: channels of zeros change no score and are cut off again.
    channels, width = value.shape[-1], max(query.shape[-1], value.shape[-1])
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
    if layer is not None:
        padded = None if mask is None else mask[:, -length:] == 0
        return layer.attend(query, key, value, own, scaling, padded).transpose(1, 2)[..., :channels], None
    if keys < length or (keys > length and not causal):
        raise ValueError(
            f"{type(module).__name__} asks {keys} keys with {length} queries: expected self-attention, dilated attention "
            "takes no other"
        )
    if keys > length and masks.is_of_last_keys(attention_mask):
        raise ValueError(
            f"a cache of the last {keys} keys, as of a sliding window, in a layer that reads earlier ones too: expected "
            "longnet.hf.BoundedCache(model) or a DynamicCache made without a config"
        )
    offset = _grid_offset(own, mask, causal)
    if mask is not None and not causal and not torch.compiler.is_compiling():
        warn_moved_rows(((count, keys) for count in masks.leading_of(mask)), own.pattern)
    if keys > length:
        start = 0
        if isinstance(offset, int) and own.pattern.beyond_paper is None:
            start = max(0, own.pattern.window_start(keys - length + offset) - offset)
        query, key, value, mask = _with_past(query, key, value, mask, start)
        offset = offset + start
    bounds = None if mask is None else masks.packed_bounds(mask)
    padding = None if mask is None else mask == 0
    batch = query.shape[0]
    if bounds is not None and padding is not None:
        query, key, value = (_in_one_row(x) for x in (query, key, value))
        padding = padding.reshape(1, -1)
    out = pattern_attention(
        query,
        key,
        value,
        own.pattern,
        segment_offset=own.segment_offset if bounds is not None else offset,
        is_causal=causal,
        scale=scaling,
        key_padding_mask=padding,
        cu_seqlens=bounds,
        backend=own.backend,
    )
    assert isinstance(out, Tensor)
    out = out.transpose(1, 2)
    if bounds is not None:
        out = out.reshape(batch, -1, *out.shape[2:])
    return out[:, -length:, :, :channels], None


def _grid_offset(own: Dilation, mask: Tensor | None, causal: bool) -> int | Tensor:
    """The grid of each row begins at its first token: the layer's own offset less leading padding, (B,) where there is some."""
    assert own.pattern is not None
    if mask is None or not causal or not own.pattern.has_grid:
        return own.segment_offset
    if not torch.compiler.is_compiling() and not any(masks.leading_of(mask)):
        return own.segment_offset
    return own.segment_offset - leading_padding(mask == 0)


def _with_past(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, start: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries of the last T of S positions as queries of all positions from ``start`` on: the others are dropped later."""
    before = key.shape[2] - query.shape[2]
    # Random-looking rows are as good as any; these are at hand, and never NaN.
    missing = query[:, :, :1].detach().expand(-1, -1, before - start, -1)
    query = torch.cat((missing, query), 2)
    return query, key[:, :, start:], value[:, :, start:], None if mask is None else mask[:, start:]


def _in_one_row(x: Tensor) -> Tensor:
    """(B, heads, N, D) to (1, heads, B * N, D), a view where tokens come before heads in memory."""
    tokens_first = x.transpose(1, 2)
    return tokens_first.reshape(1, -1, *tokens_first.shape[2:]).transpose(1, 2)
