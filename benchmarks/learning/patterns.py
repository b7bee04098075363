"""The patterns that are compared: which keys each layer's queries read, and how many pairs that is.

A key that two bands or branches of a layer share counts twice, in the softmax and in the cost, as in ``longnet``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from longnet.geometry import Pattern


@dataclass(frozen=True)
class Band:
    """Keys at distances ``near <= q - k < far`` before a query.

    Args:
        far: None for no limit.
        stride, block: of ``stride`` blocks of ``block`` tokens a head reads one, its own: block ``head mod stride``.
        heads: the first head that reads it, and the first that does not; None for all.
    """

    far: int | None
    near: int = 0
    stride: int = 1
    block: int = 1
    heads: tuple[int, int] | None = None

    def positions(self, head: int, length: int) -> np.ndarray:
        """The keys that a head selects below ``length``, rising; empty where it does not read the band."""
        if self.heads is not None and not self.heads[0] <= head < self.heads[1]:
            return np.empty(0, dtype=np.int64)
        place = np.arange(length)
        return place[place // self.block % self.stride == head % self.stride]

    def pairs(self, heads: int, length: int) -> int:
        """Query-key pairs of all heads over ``length`` tokens."""
        total = 0
        for head in range(heads):
            selected = np.zeros(length + 1, dtype=np.int64)
            selected[self.positions(head, length) + 1] = 1
            before = selected.cumsum()  # keys below a position
            query = np.arange(length)
            last = np.maximum(query + 1 - self.near, 0)
            first = np.zeros_like(last) if self.far is None else np.maximum(query + 1 - self.far, 0)
            total += int((before[last] - before[np.minimum(first, last)]).sum())
        return total


@dataclass(frozen=True)
class Layer:
    """One layer's attention: one softmax over its bands and over LongNet's branches.

    Args:
        branches: (segment length, dilation rate) of dilated attention as published; a length of None is the whole sequence.
        shift: tokens by which the branches' segments begin earlier.
        keeps_keys: not to take part in what is done to layers that reach far (``Shape.shift_keys`` and ``far_positions``).
    """

    bands: tuple[Band, ...] = ()
    branches: tuple[tuple[int | None, int], ...] = ()
    shift: int = 0
    keeps_keys: bool = False

    @property
    def reaches_far(self) -> bool:
        """Whether it reads beyond a window."""
        return bool(self.branches) or any(band.far is None or band.near > 0 for band in self.bands)

    def pattern(self, length: int) -> Pattern | None:
        """The branches as the library takes them, for ``length`` tokens after the shift."""
        if not self.branches:
            return None
        lengths = [length + self.shift if one is None else one for one, _ in self.branches]
        return Pattern.parse(lengths, [rate for _, rate in self.branches])

    def pairs(self, heads: int, length: int) -> int:
        """Query-key pairs of all heads over ``length`` tokens."""
        total = sum(band.pairs(heads, length) for band in self.bands)
        place = np.arange(length) + self.shift
        for segment_length, rate in self.branches:
            segment = place // (segment_length or length + self.shift)
            inside = place % (segment_length or length + self.shift)
            for head in range(heads):
                rows = np.bincount(segment[inside % rate == head % rate])
                total += int((rows * (rows + 1) // 2).sum())
        return total


def cost(layers: tuple[Layer, ...], heads: int, length: int) -> float:
    """Pairs of all layers over those of as many dense ones."""
    return sum(layer.pairs(heads, length) for layer in layers) / (len(layers) * heads * length * (length + 1) / 2)


WINDOW = 512
LONGNET = ((512, 1), (1024, 2), (2048, 4), (4096, 8), (8192, 16))
DENSE, LOCAL = Layer((Band(None),)), Layer((Band(WINDOW),))
PUBLISHED = Layer(branches=LONGNET)
SHIFTED = replace(PUBLISHED, shift=2 * 8192 // 3)


def strided(stride: int, block: int = 1, near: int = 0) -> Layer:
    """A window, and every ``stride``-th block of the whole past, another one for each head."""
    return Layer((Band(WINDOW), Band(None, near, stride, block)))


def growing(length: int = 32_768) -> Layer:
    """A window, then strides that double whenever the distance does: as many keys in every band."""
    bands, near, stride = [Band(WINDOW)], WINDOW, 2
    while near < length:
        bands.append(Band(2 * near, near, stride))
        near, stride = 2 * near, 2 * stride
    return Layer(tuple(bands))


def half_dense(dense_heads: int, heads: int) -> Layer:
    """Some heads read all, the others a window."""
    return Layer((Band(None, heads=(0, dense_heads)), Band(WINDOW, heads=(dense_heads, heads))))


def some(layer: Layer, *places: int, others: Layer = LOCAL) -> Callable[[int], tuple[Layer, ...]]:
    """``layer`` at these places, ``others`` elsewhere."""
    return lambda layers: tuple(layer if place in places else others for place in range(layers))


def every(step: int, layer: Layer, others: Layer = LOCAL) -> Callable[[int], tuple[Layer, ...]]:
    """``layer`` as the last of every ``step`` layers."""
    return lambda layers: tuple(layer if place % step == step - 1 else others for place in range(layers))


def middle(layer: Layer) -> Callable[[int], tuple[Layer, ...]]:
    """``layer`` in the middle half."""
    return lambda layers: tuple(
        layer if layers // 4 <= place < layers - layers // 4 else LOCAL for place in range(layers)
    )


def middle_quarter(layer: Layer, others: Layer = LOCAL) -> Callable[[int], tuple[Layer, ...]]:
    """``layer`` in the quarter in the middle, ``others`` elsewhere."""
    return lambda layers: some(layer, *range(3 * layers // 8, 3 * layers // 8 + layers // 4), others=others)(layers)


def alternating(layers: int) -> tuple[Layer, ...]:
    """Windows and LongNet in turn, every second of LongNet's grids shifted."""
    return tuple(LOCAL if place % 2 == 0 else (PUBLISHED, SHIFTED)[place // 2 % 2] for place in range(layers))


# Stacks by name, for any number of layers.
ARMS: Mapping[str, Callable[[int], tuple[Layer, ...]]] = {
    "dense": every(1, DENSE),
    "dense with middle keys shifted": middle_quarter(DENSE, others=replace(DENSE, keeps_keys=True)),
    "dense with 1/4 keys shifted": every(4, DENSE, others=replace(DENSE, keeps_keys=True)),
    "window": every(1, LOCAL),
    "window+dense 1/2": every(2, DENSE),
    "window+dense 1/4": every(4, DENSE),
    "window+dense 1/4 last": lambda layers: some(DENSE, *range(layers - layers // 4, layers))(layers),
    "window+dense 1/4 middle": middle_quarter(DENSE),
    "window+dense 1/8": every(8, DENSE),
    "window+dense 1/8 middle": lambda layers: some(DENSE, layers // 2)(layers),
    "longnet": every(1, PUBLISHED),
    "window+longnet": every(2, PUBLISHED),
    "window+longnet shifted": alternating,
    **{f"window+stride {r}": every(2, strided(r)) for r in (2, 4, 8)},
    **{f"window+stride {r} middle": middle(strided(r)) for r in (2, 4, 8)},
    **{f"window+stride {r} 1/4": every(4, strided(r)) for r in (2, 4, 8)},
    **{f"window+stride {r} blocks of {b} 1/4": every(4, strided(r, b)) for r in (2, 4) for b in (16, 32, 64)},
    **{f"window+stride {r} blocks of {b}": every(2, strided(r, b)) for r in (4, 8) for b in (16, 32, 64)},
    "window+stride 4 once 1/4": every(4, strided(4, near=WINDOW)),
    "half the heads dense": middle(half_dense(4, 8)),
    "a quarter of the heads dense": middle(half_dense(2, 8)),
    **{f"window+stride {r} middle quarter": middle_quarter(strided(r)) for r in (2, 4)},
    **{f"window+stride {r} blocks of 32 middle quarter": middle_quarter(strided(r, 32)) for r in (2, 4)},
    "growing strides middle quarter": middle_quarter(growing()),
    "growing strides": every(2, growing()),
    "growing strides middle": middle(growing()),
    "dense then window+stride 4 middle quarter": middle_quarter(strided(4)),
    "window+dilated 2": every(2, Layer(branches=((None, 2),))),
}

# Arms that are trained as another stack first, and for which share of the steps.
FIRST: Mapping[str, tuple[float, Callable[[int], tuple[Layer, ...]]]] = {
    "dense then window+stride 4 middle quarter": (0.9, ARMS["dense with middle keys shifted"]),
}
