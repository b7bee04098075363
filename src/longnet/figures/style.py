"""The shared style of all pictures: colours, canvas, axes, numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch

INK, FAINT, EMPTY = "#2b2d33", "#8a8d94", "#f1f0ec"
COLORS = ("#1f4e79", "#2a9d8f", "#e9b44c", "#d1603d", "#7d4e8a", "#5c8a3a", "#c2799b", "#4a4e57", "#a9714b", "#8fb8d6")


def branch_colors(count: int) -> list[str]:
    if count <= len(COLORS):
        return list(COLORS[:count])
    return [to_hex(colormaps["viridis"](index / count)) for index in range(count)]


def new_figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)
    return figure


def legend(figure: Figure, handles: list[Patch]) -> None:
    figure.legend(handles=handles, loc="outside lower left", ncols=5, frameon=False, fontsize=9, labelcolor=INK)


def quiet(axes: Axes) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, labelsize=8, colors=FAINT)
    axes.xaxis.label.set(size=9, color=INK)
    axes.yaxis.label.set(size=9, color=INK)


def ticks(axes: Axes, values: Sequence[int]) -> None:
    labels = [f"{value:,}" for value in values]
    axes.set_xticks(values, labels)
    axes.set_yticks(values, labels)


def short(value: float, _: object = None) -> str:
    for size, unit in ((2**40, "Ti"), (2**30, "Gi"), (2**20, "Mi"), (2**10, "Ki")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def save(figure: Figure, path: str | Path) -> Path:
    figure.savefig(path, dpi=160)
    return Path(path)
