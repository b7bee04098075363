"""Prov-GigaPath's slide encoders, by the names that its checkpoints use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

DILATION_RATES = (1, 2, 4, 8, 16)
HEADS = 16
TILE_CHANNELS = 1536

ARCHITECTURES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "gigapath_slide_enc12l384d": (12, 384),
        "gigapath_slide_enc12l768d": (12, 768),
        "gigapath_slide_enc24l1024d": (24, 1024),
        "gigapath_slide_enc12l1536d": (12, 1536),
    }
)
"""(layers, dim) by name, all of 16 heads; 384 channels are Prov-GigaPath-Flash."""


# Tiles along a side of the largest slide that checkpoints were trained for: 262,144 pixels in tiles of 256.
_TILES_A_SIDE = 1024


def segment_lengths(max_wsi_size: int | None, tile_size: int) -> tuple[int, ...]:
    """Five lengths in tiles, from 1,024 to all tiles of the largest slide rounded down to a power of two, a geometric series.

    Args:
        max_wsi_size: side of the largest slide, in pixels; None: 1,024 tiles.
        tile_size: side of a tile, in pixels.

    Raises:
        ValueError: a slide smaller than a tile.
    """
    if max_wsi_size is None:
        max_wsi_size = _TILES_A_SIDE * tile_size
    if tile_size < 1 or max_wsi_size < tile_size:
        raise ValueError(
            f"max_wsi_size={max_wsi_size} and tile_size={tile_size}: expected a slide of at least a tile, in pixels"
        )
    last = int(math.log2((max_wsi_size // tile_size) ** 2))
    steps = len(DILATION_RATES) - 1
    return tuple(int(2.0 ** (10 + (last - 10) / steps * step)) for step in range(steps + 1))
