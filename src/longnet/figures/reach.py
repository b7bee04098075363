"""The receptive field of stacked layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import FuncFormatter, MaxNLocator

from longnet.figures.style import EMPTY, FAINT, new_figure, quiet, save, short
from longnet.geometry.pattern import Pattern
from longnet.geometry.reach import reach, receptive_field


def plot_receptive_field(
    pattern: Pattern, heads: int, length: int, layers: int, path: str | Path, *, is_causal: bool = True
) -> Path:
    """Draw which positions the last one depends on after each layer, and how their number grows.

    Args:
        pattern, heads, length, path, is_causal: as in :func:`plot_pattern`.
        layers: attention layers stacked.

    Returns:
        ``path`` as a Path.
    """
    position = length - 1
    start, masks = reach(pattern, heads, length, layers, is_causal)
    reached = receptive_field(pattern, heads, length, layers, is_causal)
    visible = reached[-1].visible
    cells = min(visible, 512)
    edges = np.linspace(0, visible, cells + 1).astype(np.int64)
    share = np.stack([_bit_counts(mask, start, edges) for mask in masks]) / np.diff(edges)
    title = f"Receptive field of position {position:,} ({heads} heads, {'causal' if is_causal else 'bidirectional'})"
    figure = new_figure(9.5, 3.6 + 0.28 * layers, title)
    strips, growth = figure.subplots(1, 2, width_ratios=[2.4, 1])
    shade = LinearSegmentedColormap.from_list("reach", [EMPTY, "#9fc5c1", "#2a9d8f", "#12485a"])
    # Rows keep a gap of background between them, so that a full row does not merge with the next.
    for layer, row in enumerate(share):
        strips.imshow(
            row[None], cmap=shade, vmin=0, vmax=1, aspect="auto", interpolation="nearest",
            extent=(0, visible, layer + 0.4, layer - 0.4),
        )  # fmt: skip
    strips.plot([position + 0.5], [0], marker="s", markersize=4, color="#12485a", clip_on=False)
    strips.set(xlim=(0, visible), ylim=(layers + 0.5, -0.5), xlabel="position (tokens)", ylabel="after layer")
    strips.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    strips.yaxis.set_major_locator(MaxNLocator(min(layers + 1, 12), integer=True))
    about = "about " if visible % cells else ""
    detail = "dark: reached"
    if cells < visible:
        detail = f"reduced resolution; darkness: share reached of each {about}{round(visible / cells):,} tokens"
    strips.set_title(detail, loc="left", fontsize=9, color=FAINT)

    tokens = [1, *(layer.tokens for layer in reached)]
    growth.plot(range(layers + 1), tokens, color="#12485a", marker="o", markersize=4, linewidth=1.6)
    growth.axhline(visible, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    growth.annotate(
        f"all {visible:,}", (0, visible), xytext=(0, 4), textcoords="offset points", color=FAINT, fontsize=8
    )
    growth.set_yscale("log", base=2)
    growth.set(xlim=(-0.3, layers + 0.3), ylim=(0.7, visible * 3), xlabel="layers", ylabel="tokens reached")
    growth.xaxis.set_major_locator(MaxNLocator(min(layers + 1, 10), integer=True))
    growth.yaxis.set_major_formatter(FuncFormatter(short))
    growth.set_title(
        f"{tokens[-1] / visible:.0%} of the tokens after layer {layers}", loc="left", fontsize=9, color=FAINT
    )
    for axes in (strips, growth):
        quiet(axes)
    growth.grid(axis="y", color="#e4e3df", linewidth=0.7)
    return save(figure, path)


def _bit_counts(mask: int, start: int, edges: np.ndarray) -> np.ndarray:
    """Set bits of the mask, whose bit 0 is position ``start``, in each bin of positions."""
    size = mask.bit_length()
    raw = np.frombuffer(mask.to_bytes(-(-size // 8), "little"), dtype=np.uint8)
    below = np.concatenate([[0], np.cumsum(np.unpackbits(raw, bitorder="little")[:size], dtype=np.int64)])
    counts: np.ndarray = np.diff(below[np.clip(edges - start, 0, size)])
    return counts
