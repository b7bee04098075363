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

    Colours follow the rank of a weight, so that a few large weights do not hide the others; the bar is labelled with weights.

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
    width, height = (int(n) for n in cell.amax(0) - low + 1)
    place = (cell[:, 1] - low[1]) * width + cell[:, 0] - low[0]
    total = torch.zeros(height * width, dtype=torch.float64).index_add(0, place, weights.detach().cpu().double())
    occupied = torch.zeros(height * width, dtype=torch.bool)
    occupied[place] = True
    values = total[occupied]
    ranks = torch.searchsorted(values.sort().values, values).double() / max(1, len(values) - 1)
    shown = torch.full_like(total, torch.nan)
    shown[occupied] = ranks
    _draw(Path(path), shown.view(height, width).numpy(), values.numpy(), title, label)


def _draw(path: Path, shown: np.ndarray, values: np.ndarray, title: str, label: str) -> None:
    height, width = shown.shape
    longest = max(height, width)
    figure = Figure(figsize=(7 * width / longest + 1.8, 7 * height / longest + 0.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(shown, cmap="inferno", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(_plain(title), parse_math=False)
    ticks = (0.0, 0.25, 0.5, 0.75, 1.0)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=ticks)
    bar.set_label(f"{_plain(label)}, coloured by rank", parse_math=False)
    bar.ax.set_yticklabels([f"{value:.2g}" for value in np.quantile(values, ticks)])
    figure.savefig(path, format="png")


def _plain(text: str) -> str:
    """Text that matplotlib can draw: a file's name may hold bytes that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
