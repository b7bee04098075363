"""A heat map over a slide: one cell a tile, where the tile lies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from longnet.gigapath.batches import check_coords
from longnet.gigapath.positions import in_tiles

# Of a side of the picture, and of one with few tiles.
_MOST_CELLS, _FEW_CELLS = 500, 100


def heatmap(
    path: str | Path,
    weights: Tensor,
    coords: Tensor,
    *,
    tile_size: int = 256,
    title: str = "",
    label: str = "attention",
) -> None:
    """Draw weights over a slide as a PNG.

    Colours follow the rank of a weight, so that a few large weights do not hide the others; the bar is labelled with weights. On
    a slide of more than 500 cells a side, or of few tiles far apart, cells are joined to larger ones, which show the sum: else a
    tile could not be seen.

    Args:
        path: where the PNG is written.
        weights: (L,) real, finite.
        coords: (L, 2) pixels, x (to the right) then y (downwards): integers, float32 or float64.
        tile_size: side of a tile, in pixels. Tiles of one cell show their sum.
        title, label: shown as they are; a dollar sign starts no formula.

    Raises:
        TypeError: coordinates in half precision.
        ValueError: shapes that do not fit, no tile, or values that are not finite.
    """
    if weights.dim() != 1 or tuple(coords.shape) != (weights.shape[0], 2):
        raise ValueError(
            f"weights has shape {tuple(weights.shape)} and coords {tuple(coords.shape)}: expected (L,) and (L, 2)"
        )
    check_coords(coords)
    if not len(weights):
        raise ValueError("weights is empty: expected at least one tile")
    if not bool(weights.isfinite().all() and coords.isfinite().all()):
        raise ValueError("weights and coords hold values that are not finite: expected finite ones")
    if tile_size < 1:
        raise ValueError(f"tile_size={tile_size}: expected at least 1 pixel")
    cell = in_tiles(coords.detach().cpu(), tile_size).long()
    low = cell.amin(0)
    side = 1 + int((cell.amax(0) - low).amax()) // min(_MOST_CELLS, max(_FEW_CELLS, len(cell)))
    cell = (cell - low) // side
    width, height = (int(n) for n in cell.amax(0) + 1)
    place = cell[:, 1] * width + cell[:, 0]
    total = torch.zeros(height * width, dtype=torch.float64).index_add(0, place, weights.detach().cpu().double())
    occupied = torch.zeros(height * width, dtype=torch.bool)
    occupied[place] = True
    values = total[occupied]
    ranks = torch.searchsorted(values.sort().values, values).double() / max(1, len(values) - 1)
    if bool((values == values[0]).all()):
        ranks.fill_(0.5)
    shown = torch.full_like(total, torch.nan)
    shown[occupied] = ranks
    _draw(Path(path), shown.view(height, width).numpy(), values.numpy(), title, label, side * tile_size)


def _draw(path: Path, shown: np.ndarray, values: np.ndarray, title: str, label: str, pixels: int) -> None:
    height, width = shown.shape
    longest = max(height, width)
    figure = Figure(figsize=(7 * width / longest + 1.8, 7 * height / longest + 0.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(shown, cmap="inferno", vmin=0, vmax=1, interpolation="nearest")
    # A cell of the edge stands apart from the frame.
    axes.set_xlim(-1.5, width + 0.5)
    axes.set_ylim(height + 0.5, -1.5)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(f"{width:,} x {height:,} cells of {pixels:,} pixels")
    axes.set_title(_plain(title), parse_math=False)
    ticks = (0.5,) if values.min() == values.max() else (0.0, 0.25, 0.5, 0.75, 1.0)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=ticks)
    bar.set_label(f"{_plain(label)}, coloured by rank", parse_math=False)
    bar.ax.set_yticklabels([f"{value:.2g}" for value in np.quantile(values, ticks)])
    figure.savefig(path, format="png")


def _plain(text: str) -> str:
    """Text that matplotlib can draw: a file's name may hold bytes that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
