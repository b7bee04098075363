"""The figures of a run as PNG files. matplotlib without pyplot: no global state, no display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from longnet.training.baselines import Baselines
from longnet.training.evaluate import PositionBin

INK, SOFT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE = "#2563eb", "#d97706"


def plot_loss(metrics: Sequence[dict[str, Any]], baselines: Baselines, path: Path) -> None:
    """Bits per byte against bytes trained on: every step, their running mean, the held-out evaluations, the baselines.

    Args:
        metrics: the lines of ``metrics.jsonl``.
        baselines: drawn as level lines.
        path: the PNG to write.
    """
    steps = [line for line in metrics if line["kind"] == "train"]
    checks = [line for line in metrics if line["kind"] == "eval"]
    figure, axes = _new_figure("Loss", "bits per byte")
    seen = np.array([line["tokens"] for line in steps], dtype=float)
    bits = np.array([line["bits_per_byte"] for line in steps], dtype=float)
    axes.plot(seen, bits, color=BLUE, alpha=0.25, linewidth=0.8, label="training, each step")
    window = max(1, bits.size // 50)
    if window > 1:
        smooth = np.convolve(bits, np.ones(window) / window, mode="valid")
        axes.plot(seen[window - 1 :], smooth, color=BLUE, linewidth=2, label=f"training, mean of {window} steps")
    if checks:
        x, y = [line["tokens"] for line in checks], [line["bits_per_byte"] for line in checks]
        axes.plot(x, y, color=ORANGE, marker="o", markersize=4.5, linewidth=1.4, label="held out")
    lowest = min([bits.min(), *(line["bits_per_byte"] for line in checks), baselines.lzma])
    # The first steps are far above everything else; they may leave the picture.
    axes.set_ylim(max(0.0, lowest - 0.4), max(baselines.unigram, float(np.median(bits))) + 0.6)
    axes.set_xlim(0, seen[-1] * 1.005)
    _draw_baselines(axes, baselines)
    axes.set_xlabel("bytes trained on")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    _draw_legend(axes)
    figure.savefig(path)


def plot_positions(bins: Sequence[PositionBin], baselines: Baselines, path: Path) -> None:
    """Held-out bits per byte against the bytes of context before the predicted one, with 95 % intervals over windows."""
    figure, axes = _new_figure("Held-out bits per byte by context", "bits per byte")
    centers = np.array([np.sqrt(one.first * one.last) for one in bins])
    means = np.array([one.bits_per_byte.mean for one in bins])
    lows = np.array([_or(one.bits_per_byte.low, one.bits_per_byte.mean) for one in bins])
    highs = np.array([_or(one.bits_per_byte.high, one.bits_per_byte.mean) for one in bins])
    axes.set_xscale("log", base=2)
    axes.fill_between(centers, lows, highs, color=BLUE, alpha=0.15, linewidth=0, label="95 % interval over windows")
    axes.plot(centers, means, color=BLUE, marker="o", markersize=5, linewidth=2, label="LongNet")
    for x, y in zip(centers, means, strict=True):
        axes.annotate(f"{y:.2f}", (x, y), (0, 9), textcoords="offset points", ha="center", fontsize=8.5, color=INK)
    axes.set_xlim(centers[0] * 0.8, bins[-1].last * 1.15)
    axes.set_ylim(max(0.0, min(lows.min(), baselines.lzma) - 0.4), max(highs.max(), baselines.unigram) + 0.4)
    _draw_baselines(axes, baselines)
    axes.xaxis.set_major_locator(FixedLocator(centers.tolist()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([_range(one) for one in bins], rotation=35, ha="right", rotation_mode="anchor")
    axes.set_xlabel("bytes of context before the predicted one")
    _draw_legend(axes)
    figure.savefig(path)


def _new_figure(title: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, 4.6), dpi=150, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold", pad=12)
    axes.set_ylabel(y_label, color=INK)
    axes.xaxis.label.set_color(INK)
    axes.tick_params(colors=SOFT, labelcolor=INK, labelsize=9)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    return figure, axes


def _draw_legend(axes: Axes) -> None:
    """Above the plot, where no curve can be."""
    axes.legend(
        frameon=False,
        loc="lower right",
        bbox_to_anchor=(1.01, 0.995),
        ncols=3,
        fontsize=9,
        labelcolor=INK,
        handlelength=1.6,
    )


def _draw_baselines(axes: Axes, baselines: Baselines) -> None:
    for name, value in (("unigram", baselines.unigram), ("lzma", baselines.lzma)):
        axes.axhline(value, color=SOFT, linewidth=1.1, linestyle=(0, (5, 4)))
        axes.annotate(
            f"{name} {value:.2f}",
            (1, value),
            (-4, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=SOFT,
        )


def _range(one: PositionBin) -> str:
    return f"{one.first:,}" if one.first == one.last else f"{one.first:,}–{one.last:,}"


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _or(value: float | None, other: float) -> float:
    return other if value is None else value
