"""What each attention layer of a model computes, in the spelling of Hugging Face configs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from longnet.checks import check_int
from longnet.geometry import Pattern
from longnet.hf.layers import Dilation
from longnet.hf.transformers_internals import attends_causally, check_scores, own_windows, positions_by_type
from longnet.models.layer_types import DILATED_TYPES, LAYER_TYPES, pattern_of

DILATED, SHIFTED, SLIDING, STRIDED, FULL = LAYER_TYPES


@dataclass(frozen=True)
class Settings:
    """What the types of a model mean.

    Args:
        dilated: the pattern of dilated layers, None if there are none.
        sliding_window: tokens, W of a causal layer; a bidirectional one reads that many to both sides, as transformers does.
        stride, stride_block: of strided layers.
    """

    dilated: Pattern | None
    sliding_window: int | None
    stride: int
    stride_block: int

    def check(self, layer_types: Sequence[str]) -> None:
        """Raise ValueError for what these types need and do not have, TypeError for sizes that are no ints."""
        for name in DILATED_TYPES:
            if name in layer_types and self.dilated is None:
                raise ValueError(
                    f"layer_types holds {name!r} without segment_lengths and dilation_rates: expected a pattern"
                )
        if self.dilated is not None and not set(DILATED_TYPES) & set(layer_types):
            raise ValueError(
                f"segment_lengths={self.dilated.given_lengths} with layer_types={tuple(layer_types)}: expected a dilated "
                "layer, or no pattern"
            )
        for name in (SLIDING, STRIDED):
            if name in layer_types and self.sliding_window is None:
                raise ValueError(f"layer_types holds {name!r} with sliding_window=None: expected a number of tokens")
        if self.sliding_window is not None:
            check_int("sliding_window", self.sliding_window, 1)
        check_int("stride", self.stride, 1)
        check_int("stride_block", self.stride_block, 1)

    def form(self, layer_type: str, is_causal: bool, heads: int, kv_heads: int) -> tuple[Pattern, int]:
        """What a layer of this type computes: (pattern, segment_offset)."""
        if layer_type in DILATED_TYPES:
            assert self.dilated is not None
            return self.dilated, self.dilated.shifted_offset if layer_type == SHIFTED else 0
        # Without causality transformers counts the keys on one side of a query, longnet its own with them.
        window = (self.sliding_window or 0) + (not is_causal)
        return pattern_of(layer_type, window, self.stride, self.stride_block).grouped(heads, kv_heads), 0


def dilations_of(
    model: PreTrainedModel,
    layers: Sequence[Any],
    layer_types: Sequence[str],
    settings: Settings,
    backend: str,
    original: str,
) -> list[Dilation]:
    """How each attention layer attends.

    Raises:
        TypeError, ValueError: as :meth:`Settings.check`; also layers whose scores are no plain ones, or whose positions depend
            on their type, and which would have another.
    """
    windows, config = own_windows(model, layers), layers[0].config
    if settings.sliding_window is None:
        settings = replace(settings, sliding_window=next((window for window in windows if window is not None), None))
    settings.check(layer_types)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    found, changed = [], []
    for module, layer_type, window in zip(layers, layer_types, windows, strict=True):
        if (layer_type == FULL and window is None) or (layer_type == SLIDING and window == settings.sliding_window):
            found.append(Dilation(None, backend, original, window=window))
            continue
        changed.append(module)
        pattern, offset = settings.form(layer_type, attends_causally(module), heads, kv_heads)
        found.append(Dilation(pattern, backend, original, offset, had_window=window is not None))
    check_scores(model, changed)
    if changed and positions_by_type(config):
        raise ValueError(
            f"{type(model).__name__} rotates queries and keys by a layer's own type: expected layer_types that leave every "
            "layer as it is, or a model whose layers rotate alike"
        )
    return found
