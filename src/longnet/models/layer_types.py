"""What the layers of a model compute, by type, in the spelling of Hugging Face configs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from longnet.geometry import Pattern

# All types that a config's ``layer_types`` may hold.
LAYER_TYPES = (
    *("dilated_attention", "shifted_dilated_attention", "sliding_attention", "strided_attention", "full_attention"),
)
# Those that read ``segment_lengths``, and those that read far: ``shift_keys`` and ``far_positions`` are about these.
DILATED_TYPES = LAYER_TYPES[:2]
FAR_TYPES = LAYER_TYPES[3:]


def expand_layer_types(layer_types: Sequence[str], layers: int) -> tuple[str, ...]:
    """One type for each layer: a shorter tuple, whose length divides the number of layers, is repeated.

    Raises:
        TypeError: one string, or an entry that is none. ValueError: an unknown type, or a length that does not divide.
    """
    if isinstance(layer_types, str) or not isinstance(layer_types, Sequence):
        kind = type(layer_types).__name__
        raise TypeError(f"layer_types={layer_types!r} has type {kind}: expected a tuple of layer types, or None")
    for one in layer_types:
        if not isinstance(one, str):
            raise TypeError(f"layer_types holds {one!r} of type {type(one).__name__}: expected strings")
        if one not in LAYER_TYPES:
            raise ValueError(f"layer_types holds {one!r}: expected one of {LAYER_TYPES}")
    if not layer_types or layers % len(layer_types):
        raise ValueError(
            f"layer_types={tuple(layer_types)!r} has {len(layer_types)} entries: expected a number that divides layers={layers}"
        )
    return tuple(layer_types) * (layers // len(layer_types))


def pattern_of(layer_type: str, sliding_window: int, stride: int, stride_block: int) -> Pattern:
    """What a layer computes whose type is none of ``DILATED_TYPES``; for any number of heads until it is ``grouped``.

    Raises:
        TypeError, ValueError: sizes that are no ints or below 1.
    """
    try:
        if layer_type == "full_attention":
            return Pattern.compose(None, 1)
        if layer_type == "sliding_attention":
            return Pattern.compose(window=sliding_window)
        return Pattern.compose(
            None,
            stride,
            window=sliding_window,
            dilated_queries=False,
            dilation_block=stride_block,
            head_offsets="grouped",
        )
    except (TypeError, ValueError) as error:
        # Name the fields as they are called here.
        said = str(error).replace("window=", "sliding_window=").replace("dilation_block=", "stride_block=")
        said = re.sub(r"stride=\((.*?),\)", r"stride=\1", said.replace("dilation_rates=", "stride="))
        raise type(error)(said) from None
