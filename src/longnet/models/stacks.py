"""Stacks of layers by name: what each layer of a model reads. The page on evidence says what they learn and cost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any


def _stack(layers: int, window: int, far: str, places: Collection[int]) -> dict[str, Any]:
    """Windows, and layers of type ``far`` at these places, which hold the token before and know no positions."""
    return {
        "layer_types": tuple(far if layer in places else "sliding_attention" for layer in range(layers)),
        "sliding_window": window,
        "shift_keys": True,
        "far_positions": False,
    }


def _balanced(layers: int, window: int) -> dict[str, Any]:
    count = max(1, layers // 8)
    return _stack(layers, window, "full_attention", [(2 * i + 1) * layers // (2 * count) for i in range(count)])


def _light(layers: int, window: int) -> dict[str, Any]:
    count = max(1, layers // 4)
    first = (layers - count + 1) // 2
    return _stack(layers, window, "strided_attention", range(first, first + count))


DEFAULT_STACK = "balanced"

STACKS: Mapping[str, Callable[[int, int], Mapping[str, Any]]] = {
    "balanced": _balanced,
    "light": _light,
    "longnet": lambda layers, window: {"layer_types": None, "shift_keys": False, "far_positions": True},
}
"""By name, fields of a config for (layers, window). ``"balanced"``: windows, and one full layer for every eight, at least one.
``"light"``: windows, and every fourth key of all before in one layer of four, at least one, in the middle. ``"longnet"``: the
paper's pattern in all layers."""
