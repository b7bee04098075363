"""The figures of a run as PNG files. matplotlib without pyplot: no global state, no display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

from longnet.training.baselines import Baselines
from longnet.training.evaluate import CutContext, PositionBin

INK, SOFT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE = "#2563eb", "#d97706"


def plot_loss(metrics: Sequence[dict[str, Any]], baselines: Baselines, path: Path, unit: str = "bytes") -> None:
    """Bits per byte against tokens trained on: every step, their running mean, the held-out evaluations, the baselines.

    Args:
        metrics: the lines of ``metrics.jsonl``.
        baselines: drawn as level lines.
        path: the PNG to write.
        unit: what a token is called.
    """
    steps = [line for line in metrics if line["kind"] == "train"]
    checks = [line for line in metrics if line["kind"] == "eval"]
    figure = _new_figure()
    axes = figure.add_subplot()
    _style(axes, "Loss", "bits per byte")
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
    # The first steps are far above all others and may lie outside of the picture.
    axes.set_ylim(max(0.0, lowest - 0.4), max(baselines.unigram, float(np.median(bits))) + 0.6)
    axes.set_xlim(0, seen[-1] * 1.005)
    _draw_baselines(axes, baselines)
    axes.set_xlabel(f"{unit} trained on")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _draw_legend(axes)
    figure.savefig(path)


def plot_positions(
    bins: Sequence[PositionBin], cuts: Sequence[CutContext], baselines: Baselines, path: Path, unit: str = "bytes"
) -> None:
    """Left, held-out bits per byte by tokens of context; right, the bits that context beyond a cut saves.

    Args:
        bins: by position, drawn with their 95 % intervals over windows.
        cuts: drawn as bits saved with their 95 % intervals; if empty, there is no right panel.
        baselines: drawn as level lines.
        path: the PNG to write.
    """
    figure = _new_figure()
    if cuts:
        left, right = figure.subplots(1, 2, width_ratios=[2.4, 1])
        _style(right, "Worth of more context", "bits per byte saved")
        _draw_gains(right, cuts, unit)
    else:
        left = figure.add_subplot()
    _style(left, "Held-out bits per byte by context", "bits per byte")
    centers = np.array([np.sqrt(one.first * one.last) for one in bins])
    means = np.array([one.bits_per_byte.mean for one in bins])
    lows = np.array([_bound(one.bits_per_byte.low, one.bits_per_byte.mean) for one in bins])
    highs = np.array([_bound(one.bits_per_byte.high, one.bits_per_byte.mean) for one in bins])
    left.set_xscale("log", base=2)
    left.fill_between(centers, lows, highs, color=BLUE, alpha=0.15, linewidth=0, label="95 % interval over windows")
    left.plot(centers, means, color=BLUE, marker="o", markersize=5, linewidth=2, label="LongNet")
    for x, y in zip(centers, means, strict=True):
        left.annotate(f"{y:.2f}", (x, y), (0, 9), textcoords="offset points", ha="center", fontsize=8.5, color=INK)
    left.set_xlim(centers[0] * 0.75, bins[-1].last * 1.3)
    left.set_ylim(max(0.0, min(lows.min(), baselines.lzma) - 0.5), max(highs.max(), baselines.unigram) + 0.4)
    _draw_baselines(left, baselines)
    left.xaxis.set_major_locator(FixedLocator(centers.tolist()))
    left.xaxis.set_minor_locator(NullLocator())
    left.set_xticklabels([_range(one) for one in bins], rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    left.set_xlabel(f"{unit} of context before the predicted one")
    _draw_legend(left)
    figure.savefig(path)


def _draw_gains(axes: Axes, cuts: Sequence[CutContext], unit: str) -> None:
    """Bits per byte that the whole context saves against each cut, the shortest cut first."""
    axes.axhline(0, color=SOFT, linewidth=1.1)
    for number, cut in enumerate(cuts):
        mean, low, high = cut.gain.mean, _bound(cut.gain.low, cut.gain.mean), _bound(cut.gain.high, cut.gain.mean)
        axes.plot([number, number], [low, high], color=BLUE, linewidth=7, alpha=0.25, solid_capstyle="butt")
        axes.plot(number, mean, color=BLUE, marker="o", markersize=6)
        # Away from the line at zero.
        place, shift = ((number, high), 5) if mean >= 0 else ((number, low), -13)
        axes.annotate(
            f"{mean:+.3f}", place, (0, shift), textcoords="offset points", ha="center", fontsize=8.5, color=INK
        )
    axes.set_xticks(range(len(cuts)), [f"{cut.last:,}" for cut in cuts])
    axes.set_xlim(-0.6, len(cuts) - 0.4)
    axes.margins(y=0.2)
    axes.set_xlabel(f"{unit} that the context is cut to")


def _new_figure() -> Figure:
    return Figure(figsize=(10, 4.6), dpi=150, layout="constrained", facecolor="white")


def _style(axes: Axes, title: str, y_label: str) -> None:
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


def _draw_legend(axes: Axes) -> None:
    """Halfway up on the right, where few curves pass, and away from the level lines."""
    legend = axes.legend(loc="center right", bbox_to_anchor=(1, 0.48), fontsize=9, labelcolor=INK, handlelength=1.6)
    legend.get_frame().set(edgecolor="none", facecolor="white", alpha=0.85)


def _draw_baselines(axes: Axes, baselines: Baselines) -> None:
    """Those between the limits of the axes: lzma of a few bytes is far above, and its name would take all room."""
    low, high = axes.get_ylim()
    for name, value in (("unigram", baselines.unigram), ("lzma", baselines.lzma)):
        if not low <= value <= high:
            continue
        axes.axhline(value, color=SOFT, linewidth=1.1, linestyle=(0, (5, 4)))
        axes.annotate(
            f"{name} {value:.2f}",
            (1, value),
            (-4, -4),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=9,
            color=SOFT,
        )


def _range(one: PositionBin) -> str:
    return f"{one.first:,}" if one.first == one.last else f"{one.first:,}–{one.last:,}"


def _bound(value: float | None, other: float) -> float:
    return other if value is None else value
