"""The bounded cache of :mod:`longnet.attention.streaming` behind Hugging Face's ``Cache``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from longnet.attention.streaming import DilatedCache, stream_attention
from longnet.hf.layers import ATTRIBUTE, Dilation, dilated_layers
from longnet.hf.transformers_internals import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    unbounded_reason,
)
from longnet.runtime.autocast import autocast_dtype

# A model hands the keys that a cache gave it to the attention function, and nothing else of the cache.
_LAYER = "longnet_layer"


class BoundedLayer(CacheLayerMixin):
    """One layer's keys and values that later tokens can reach.

    ``update`` keeps nothing: the attention function reads the new tokens with :meth:`attend`.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.cache: DilatedCache | None = None
        self._expected = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first :meth:`attend` makes the cache, it knows the query heads."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values, which say whose they are."""
        if self._expected:
            raise ValueError(
                "a bounded cache was given tokens that no attention has read: its model is not dilated any more, changes "
                "keys on the way to its attention function, or failed on the way; expected a new longnet.hf.BoundedCache, or a "
                "DynamicCache"
            )
        self._expected = True
        keys = key_states.view(key_states.shape)
        setattr(keys, _LAYER, self)
        return keys, value_states

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, own: Dilation, scale: float | None, padded: Tensor | None
    ) -> Tensor:
        """(B, H, T, D) of the next T tokens; ``padded`` (B, T) bool."""
        if not self._expected:
            raise ValueError(
                "a layer calls its attention function more than once with the same tokens: a bounded cache reads them once; "
                "expected a DynamicCache"
            )
        if self.cache is None:
            batch, heads, _, head_dim = query.shape
            # Under autocast a model may hand over keys of one type and values of another: they are cast alike.
            dtype = autocast_dtype(query.device.type) or key.dtype
            self.cache = _make_cache(own, batch, heads, key.shape[1], head_dim, dtype, key.device)
            self.is_initialized = True
        if padded is not None and self.cache.pattern.has_grid:
            leading = self.cache._leading(padded)
            if leading is not None:
                self.cache.set_segment_offset(own.segment_offset - leading)
        out = stream_attention(query, key, value, self.cache, scale=scale, key_padding_mask=padded)
        self._expected = False
        return out

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens; their number is given as a negative one, as transformers does.

        Raises:
            ValueError: a number above 0, more tokens than there are, padding, or tokens over the end of a segment: their keys
                were written over.
        """
        position = self.get_seq_length()
        keep = position + int(tokens_to_remove)
        if not 0 <= keep <= position:
            raise ValueError(f"tokens_to_remove={int(tokens_to_remove)}: expected {-position} to 0")
        if self.cache is None or keep == position:
            return
        if int(self.cache.padding.max()) > keep:
            raise ValueError(f"crop to {keep} of {position} tokens: some are padding; expected reset() and a new read")
        if not self.cache.holds(keep):
            raise ValueError(
                f"crop to {keep} of {position} tokens: a segment has ended since and was written over; expected a DynamicCache"
            )
        # Rows after the position are written before they are read.
        self.cache.moved(keep - position)

    def get_seq_length(self) -> int:
        return 0 if self.cache is None else self.cache.position

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.cache, self._expected, self.is_initialized = None, False, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.cache is not None:
            self.cache.reorder(beam_idx)

    def offload(self) -> None:
        """Stays where it is: it is small."""

    def prefetch(self) -> None:
        """Is where it was."""


def _make_cache(
    own: Dilation, batch_size: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> DilatedCache:
    assert own.pattern is not None
    pattern = own.pattern
    return DilatedCache(
        pattern.given_lengths,
        pattern.dilation_rates,
        batch_size=batch_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        **pattern.options,
        segment_offset=own.segment_offset,
        backend=own.backend,
        dtype=dtype,
        device=device,
    )


def _layer_of(own: Dilation) -> CacheLayerMixin:
    """The cache of a layer that attends like this."""
    if own.pattern is not None:
        return BoundedLayer()
    return DynamicLayer() if own.window is None else DynamicSlidingWindowLayer(own.window)


def bounded_layer(keys: Tensor) -> BoundedLayer | None:
    """The layer that gave a model these keys."""
    layer = getattr(keys, _LAYER, None)
    return layer if isinstance(layer, BoundedLayer) else None


class BoundedCache(Cache):
    """A cache for a decoder under :func:`apply`, as ``past_key_values``; ``generate`` makes one by itself.

    Dilated layers keep what later tokens can reach (see :class:`longnet.DilatedCache`), at most w / r keys a head in a branch
    (w, r), sliding ones their window, strided ones a share of all keys; layers that attend as before keep what they kept.
    Logits are those of one forward over everything read. It takes padding before a row's first real token only, can be
    cropped within a segment, and holds no graph: read under ``torch.no_grad()``.
    After a forward that raised between two layers it refuses to go on.

    Raises:
        ValueError: a model that is not dilated, no decoder, or one whose attention layers are not all of its layers.
    """

    # PEFT asks for it: no limit.
    max_cache_len = -1

    def __init__(self, model: PreTrainedModel) -> None:
        attending = dilated_layers(model)
        if not all(getattr(module, "is_causal", True) for module in attending):
            raise ValueError(f"{type(model).__name__} attends to later tokens: expected a decoder")
        reason = unbounded_reason(attending)
        if reason is not None:
            raise ValueError(f"{type(model).__name__} {reason}: expected the model's own cache")
        super().__init__(layers=[_layer_of(getattr(module, ATTRIBUTE)) for module in attending])
        self._last_layer, self._position = -1, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *rest: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """What a layer calls with the keys and values (B, Hk, T, D) of the next tokens.

        Raises:
            ValueError: the layer stands elsewhere than the first layer of this forward: an earlier forward raised half-way.
        """
        position = self.get_seq_length(layer_idx)
        if layer_idx <= self._last_layer:
            self._last_layer = -1
        if self._last_layer == -1:
            self._position = position
        elif position != self._position:
            raise ValueError(
                f"layer {layer_idx} of the cache stands at position {position} and an earlier one at {self._position}: a forward "
                "raised half-way; expected a new longnet.hf.BoundedCache, or one after reset()"
            )
        self._last_layer = layer_idx
        updated: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *rest, **options)
        return updated

    @property
    def nbytes(self) -> int:
        """Bytes of the layers that dilate; from the first token on the same, where no layer is strided or reads all."""
        return sum(layer.cache.nbytes for layer in self.layers if isinstance(layer, BoundedLayer) and layer.cache)
