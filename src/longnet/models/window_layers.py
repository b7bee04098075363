"""Which full layers of a trained model stay full when the others get windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from longnet.checks import check_int
from longnet.models.layer_types import expand_layer_types


@dataclass(frozen=True)
class WindowStep:
    """A model after one more layer got a window.

    Args:
        layer: the number of this layer, from 0.
        layer_types: of all layers, after this step.
        loss: of the model with these layers.
    """

    layer: int
    layer_types: tuple[str, ...]
    loss: float

    @property
    def full_layers(self) -> tuple[int, ...]:
        """The numbers of the layers that are still full."""
        return full_layers(self.layer_types)


def full_layers(layer_types: Sequence[str]) -> tuple[int, ...]:
    """The numbers of the full layers, from 0."""
    return tuple(at for at, name in enumerate(layer_types) if name == "full_attention")


def window_layers(
    layer_types: Sequence[str], loss: Callable[[tuple[str, ...]], float], full: int = 1
) -> Iterator[WindowStep]:
    """Give full layers a window, one after another: each time the layer whose window raises the loss least.

    A model of L full layers takes about L^2 / 2 losses down to one full layer. Train the model further afterwards.

    Args:
        layer_types: of the trained model, one for each layer: a shorter tuple is not repeated.
        loss: of the model with the layer types that it is called with, on text of the context that matters. Use a few long
            windows, always the same ones.
        full: how many layers stay full.

    Yields:
        a step for every layer that gets a window, the cheapest first.

    Raises:
        TypeError: ``full`` is no int, ``layer_types`` no sequence of strings.
        ValueError: an unknown layer type, ``full`` below 0 or not below the number of full layers, a loss that is not finite.
    """
    types = list(expand_layer_types(layer_types, len(layer_types)))
    check_int("full", full, 0)
    candidates = list(full_layers(types))
    if not candidates:
        raise ValueError(f"layer_types={tuple(types)} has no full layer: expected some that can get windows")
    if not 0 <= full < len(candidates):
        raise ValueError(
            f"full={full}: expected from 0 to {len(candidates) - 1}, as layer_types={types} has full layers"
        )

    def windowed(layer: int) -> tuple[str, ...]:
        return tuple("sliding_attention" if at == layer else name for at, name in enumerate(types))

    while len(candidates) > full:
        losses = {layer: float(loss(windowed(layer))) for layer in candidates}
        if bad := {layer: value for layer, value in losses.items() if not math.isfinite(value)}:
            raise ValueError(f"loss is {bad} with a window in these layers: expected finite numbers")
        layer = min(losses, key=losses.__getitem__)
        candidates.remove(layer)
        types[layer] = "sliding_attention"
        yield WindowStep(layer, tuple(types), losses[layer])
