"""Small random slides and encoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longnet.gigapath import SlideEncoder

TILE, GRID = 256, 64
# Segments of 1024, 1217, 1448, 1722, 2048 tiles: 1217 and 1722 are no multiples of their rates, 2 and 8.
SIDE = TILE * 46


def encoder(layers: int = 2, dtype: torch.dtype = torch.float64, **options: Any) -> SlideEncoder:
    torch.manual_seed(0)
    small = {"in_dim": 24, "max_wsi_size": SIDE, "tile_size": TILE, "slide_ngrids": GRID, **options}
    model = SlideEncoder(32, layers, **small).to(dtype)  # type: ignore[arg-type]
    # Biases and norms that are not their start, so that a name in the wrong place shows.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter.shape[0] == 32:
                parameter.mul_(1.5)
    return model.eval()


def slides(tiles: int, batch: int = 1, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tiles, 24, generator=generator, dtype=torch.float64).to(dtype)
    cell = torch.stack([torch.randperm(GRID * GRID, generator=generator)[:tiles] for _ in range(batch)])
    within = torch.rand(batch, tiles, 2, generator=generator) * (TILE - 1)
    coords = torch.stack((cell // GRID, cell % GRID), dim=-1) * TILE + within
    return x, coords
