"""The attention layers of a dilated model, and how each attends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from longnet.geometry import Pattern
from longnet.hf.transformers_internals import attention_layers

# The attention implementation of dilated models.
NAME = "longnet_dilated"
# Where an attention module says how it attends.
ATTRIBUTE = "longnet_dilation"


@dataclass(frozen=True)
class Dilation:
    """How one layer attends: by ``pattern``, or with None as before. ``original`` is what its model was set to.

    Args:
        segment_offset: of the pattern.
        window: the sliding window of a layer that attends as before; None if it has none.
        had_window: whether its model gives it a sliding window, in place of which the pattern stands.
    """

    pattern: Pattern | None
    backend: str
    original: str
    segment_offset: int = 0
    window: int | None = None
    had_window: bool = False


def dilated_layers(model: PreTrainedModel) -> list[Any]:
    """The attention layers of a model under :func:`longnet.hf.apply`, in order.

    Raises:
        ValueError: another model.
    """
    layers = attention_layers(model)
    if not layers or not all(hasattr(module, ATTRIBUTE) for module in layers):
        raise ValueError(f"{type(model).__name__} is not dilated: expected a model under longnet.hf.apply")
    return layers
