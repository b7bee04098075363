"""Where a tile lies on its slide: two-dimensional sine-cosine positions, computed from the tile's cell on the fly."""

from __future__ import annotations

import torch
from torch import Tensor

from longnet.runtime.cache import tensor_cache
from longnet.runtime.torch_internals import assert_async
from longnet.runtime.tracing import is_traced


def cells(coords: Tensor, tile_size: int, grid: int) -> tuple[Tensor, Tensor]:
    """Pixels (..., 2), x then y, to cells (..., 2) int64 of a grid x grid raster; whether one is outside.

    A tile outside gets a cell at the edge: :class:`Check` refuses it.
    """
    cell, inside = _raster(coords, tile_size, grid)
    return cell.long().clamp(0, grid - 1), ~inside.all()


def _raster(coords: Tensor, tile_size: int, grid: int) -> tuple[Tensor, Tensor]:
    """(coordinates in cells, whether each tile is inside of the grid)."""
    cell = in_tiles(coords, tile_size)
    return cell, ((cell >= 0) & (cell < grid)).all(-1)


def in_tiles(coords: Tensor, tile_size: int) -> Tensor:
    """Pixels to whole tiles, rounded down."""
    if not coords.is_floating_point():
        # A short integer type may not hold the tile size.
        coords = coords.long()
    elif coords.dtype == torch.float16:
        coords = coords.float()
    return torch.div(coords, tile_size, rounding_mode="floor")


class Check:
    """Refuses tiles outside of the grid. A GPU is asked at once and answers later: waiting for it would leave it idle.

    Args:
        outside: from :func:`cells`.
    """

    def __init__(self, outside: Tensor) -> None:
        self._ready = torch.cuda.Event() if outside.is_cuda else None
        self._outside = outside.to("cpu", non_blocking=True)
        if self._ready is not None:
            self._ready.record(torch.cuda.current_stream(outside.device))

    def finish(self, coords: Tensor, tile_size: int, grid: int) -> None:
        """Wait for the answer.

        Raises:
            ValueError: a tile outside of the grid; the message names the first.
        """
        if self._ready is not None:
            self._ready.synchronize()
        if not bool(self._outside):
            return
        _, inside = _raster(coords, tile_size, grid)
        place = tuple(int(i) for i in (~inside).nonzero()[0])
        raise ValueError(
            f"coords{list(place)} = {coords[place].tolist()} is outside of the grid: expected x and y from 0 to below "
            f"{grid * tile_size} pixels ({grid} cells of {tile_size})"
        )


def check_cells(outside: Tensor) -> bool:
    """Whether the check of :func:`cells` is left to the graph that torch traces, or out on the meta device: there are no values.

    What is exported raises RuntimeError when it meets a tile outside of the grid.
    """
    if torch.compiler.is_exporting() or (is_traced() and not torch.compiler.is_compiling()):
        assert_async(~outside, "coords: a tile is outside of the grid")
        return True
    return outside.is_meta


def position_embedding(cell: Tensor, table: Tensor) -> Tensor:
    """Cells (..., 2) to (..., C): the first half of the channels is from y, the second from x.

    Args:
        table: (grid, C / 2), see :func:`axis_table`.
    """
    return torch.cat((table[cell[..., 1]], table[cell[..., 0]]), dim=-1)


@tensor_cache(4)
def axis_table(grid: int, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(grid, channels) of one axis: ``sin(p * omega)`` then ``cos(p * omega)``, ``omega_i = 10000 ** (-i / (channels / 2))``.

    The angle is float64.
    """
    with torch.inference_mode(False), torch.no_grad():
        half = channels // 2
        omega = 10_000.0 ** (-torch.arange(half, dtype=torch.float64, device="cpu") / half)
        angle = torch.arange(grid, dtype=torch.float64, device="cpu")[:, None] * omega
        return torch.cat((angle.sin(), angle.cos()), dim=1).to(device, dtype)
