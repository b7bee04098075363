"""Pictures of a pattern: what attends to what, how far layers see, and what it costs. Needs numpy and matplotlib.

Figures are drawn on a canvas of their own, so no display is needed and pyplot's state is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, to_hex
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from longnet.geometry.cost import positive_int, score_pairs
from longnet.geometry.coverage import reach, receptive_field
from longnet.geometry.pattern import Branch, Pattern

EXACT_TOKENS = 128
_WINDOW = 48
_CELLS = 256
_PANELS = 16
_INK, _FAINT, _EMPTY = "#2b2d33", "#8a8d94", "#f1f0ec"
_COLORS = ("#1f4e79", "#2a9d8f", "#e9b44c", "#d1603d", "#7d4e8a", "#5c8a3a", "#c2799b", "#4a4e57", "#a9714b", "#8fb8d6")


def plot_pattern(pattern: Pattern, heads: int, length: int, path: str | Path, *, is_causal: bool = True) -> Path:
    """Draw which key each query reads, per head, coloured by branch. Heads with the same offsets share a panel.

    Up to 128 tokens every (query, key) pair is a cell; one that several branches read has the longest segment's colour.
    Beyond, an overview of the sequence at reduced resolution (each cell coloured by the branch with the most pairs in
    it) stands beside an exact window of 48 tokens per head, around the end of the first shortest segment, where the
    branches part. The titles say so.

    Args:
        pattern: the branches.
        heads: query heads H.
        length: tokens N.
        path: the picture's file; its suffix says the format (``.png``).
        is_causal: leave out the keys after the query.

    Returns:
        ``path`` as a Path.
    """
    positive_int("length", length)
    groups: dict[tuple[int, ...], list[int]] = {}
    for head in range(positive_int("heads", heads)):
        groups.setdefault(tuple(pattern.offset(branch, head, heads) for branch in pattern.branches), []).append(head)
    shown = list(groups.values())[:_PANELS]
    branches = sorted(pattern.branches, key=lambda branch: (branch.segment_length, branch.dilation_rate))
    colors = _branch_colors(len(branches))
    kind = "causal" if is_causal else "bidirectional"
    title = f"Dilated attention, {length:,} tokens, {heads} heads, {kind}"
    if len(shown) < len(groups):
        title += f" (the first {len(shown)} of {len(groups)} distinct heads)"

    count = len(shown)
    if length <= EXACT_TOKENS:
        columns, rows, window = min(count, 4), -(-count // min(count, 4)), range(length)
        side = 3.4 if count <= 2 else 2.4
        figure = _figure(max(5.5, columns * side), rows * (side + 0.1) + 1.0, title)
        right: FigureBase = figure
    else:
        rows = 1 if count == 1 else max(2, int(count**0.5))
        columns, height = -(-count // rows), 5.4
        panels = max(3.5, columns * (height / rows + 0.1))
        figure = _figure(height + 0.4 + panels, height + 1.2, title)
        grid = figure.add_gridspec(1, 2, width_ratios=[height + 0.4, panels])
        left, right = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
        window = _corner(branches, length)
        _draw_overview(left, pattern, branches, colors, heads, length, window, is_causal)
        about = f"per head, tokens {window.start:,} to {window.stop - 1:,} (the square):\n"
        about += "a cell is a pair, the longest segment on top"
        right.suptitle(about, x=0.02, ha="left", fontsize=9, color=_FAINT)
    for index, members in enumerate(shown):
        axes = right.add_subplot(rows, columns, 1 + index)
        _draw_window(axes, pattern, branches, colors, members, heads, window, is_causal)
        below, first = index + columns >= count, index % columns == 0
        axes.tick_params(labelbottom=below, labelleft=first)
        axes.set(xlabel="key position" if below else "", ylabel="query position" if first else "")
    names = [f"segment {branch.segment_length:,}, rate {branch.dilation_rate:,}" for branch in branches]
    _legend(figure, [Patch(color=color, label=name) for color, name in zip(colors, names, strict=True)])
    return _save(figure, path)


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
    found = receptive_field(pattern, heads, length, layers, is_causal)
    visible = found[-1].visible
    cells = min(visible, 512)
    edges = np.linspace(0, visible, cells + 1).astype(np.int64)
    share = np.stack([_bit_counts(mask, start, edges) for mask in masks]) / np.diff(edges)
    title = f"Receptive field of position {position:,} ({heads} heads, {'causal' if is_causal else 'bidirectional'})"
    figure = _figure(9.5, 3.6 + 0.28 * layers, title)
    strips, growth = figure.subplots(1, 2, width_ratios=[2.4, 1])
    shade = LinearSegmentedColormap.from_list("reach", [_EMPTY, "#9fc5c1", "#2a9d8f", "#12485a"])
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
    strips.set_title(detail, loc="left", fontsize=9, color=_FAINT)

    tokens = [1, *(layer.tokens for layer in found)]
    growth.plot(range(layers + 1), tokens, color="#12485a", marker="o", markersize=4, linewidth=1.6)
    growth.axhline(visible, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)))
    growth.annotate(
        f"all {visible:,}", (0, visible), xytext=(0, 4), textcoords="offset points", color=_FAINT, fontsize=8
    )
    growth.set_yscale("log", base=2)
    growth.set(xlim=(-0.3, layers + 0.3), ylim=(0.7, visible * 3), xlabel="layers", ylabel="tokens reached")
    growth.xaxis.set_major_locator(MaxNLocator(min(layers + 1, 10), integer=True))
    growth.yaxis.set_major_formatter(FuncFormatter(_short))
    growth.set_title(
        f"{tokens[-1] / visible:.0%} of the tokens after layer {layers}", loc="left", fontsize=9, color=_FAINT
    )
    for axes in (strips, growth):
        _quiet(axes)
    growth.grid(axis="y", color="#e4e3df", linewidth=0.7)
    return _save(figure, path)


def plot_cost(
    pattern: Pattern, heads: int, lengths: Sequence[int], path: str | Path, *, is_causal: bool = True
) -> Path:
    """Draw the mean number of keys per query against the sequence length, beside dense attention. Log-log.

    Args:
        pattern, heads, path, is_causal: as in :func:`plot_pattern`.
        lengths: sequence lengths in tokens, at least two different ones.

    Returns:
        ``path`` as a Path.

    Raises:
        ValueError: fewer than two different lengths.
    """
    ordered = sorted(set(lengths))
    if len(ordered) < 2:
        raise ValueError(f"lengths={tuple(lengths)} is too few to draw: expected at least two different lengths")
    mean = [score_pairs(pattern, heads, n, is_causal) / (heads * n) for n in ordered]
    dense = [(n + 1) / 2 if is_causal else float(n) for n in ordered]
    figure = _figure(6.4, 4.4, f"Keys per query ({heads} heads, {'causal' if is_causal else 'bidirectional'})")
    axes = figure.add_subplot()
    axes.fill_between(ordered, mean, dense, color="#2a9d8f", alpha=0.08, linewidth=0)
    axes.plot(ordered, dense, color=_FAINT, linewidth=1.6, linestyle=(0, (4, 3)))
    axes.plot(ordered, mean, color="#12485a", linewidth=2.2)
    for values, name, color in ((dense, "dense", _FAINT), (mean, "dilated", "#12485a")):
        label = f"{name}\n{_short(values[-1])}"
        axes.annotate(
            label,
            (ordered[-1], values[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=9,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set(xlim=(ordered[0], ordered[-1]), xlabel="sequence length (tokens)", ylabel="keys per query (mean)")
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.yaxis.set_major_formatter(FuncFormatter(_short))
    if mean[-1]:
        times = dense[-1] / mean[-1]
        about = (
            f"at {ordered[-1]:,} tokens dense attention reads {times:,.{0 if times >= 10 else 1}f} times as many keys"
        )
        axes.set_title(about, loc="left", fontsize=9, color=_FAINT)
    _quiet(axes)
    axes.grid(color="#e4e3df", linewidth=0.7)
    return _save(figure, path)


def _draw_window(
    axes: Axes, pattern: Pattern, branches: list[Branch], colors: list[str], members: list[int], heads: int,
    window: range, is_causal: bool,
) -> None:  # fmt: skip
    """One head's exact pairs among the window's tokens. Longer segments lie on top: they are the sparser ones."""
    positions = np.arange(window.start, window.stop)
    cells = np.zeros((len(positions), len(positions)), dtype=np.int64)
    for index, branch in enumerate(branches, 1):
        local = positions % branch.segment_length
        taken = local % branch.dilation_rate == pattern.offset(branch, members[0], heads)
        segment = positions // branch.segment_length
        cells[taken[:, None] & taken & (segment[:, None] == segment)] = index
    if is_causal:
        cells[positions[:, None] < positions] = -1
    edges = (window.start - 0.5, window.stop - 0.5, window.stop - 0.5, window.start - 0.5)
    axes.imshow(
        cells, cmap=ListedColormap(["white", _EMPTY, *colors]), vmin=-1, vmax=len(branches), interpolation="nearest",
        extent=edges,
    )  # fmt: skip
    name = f"head {members[0]}" if len(members) == 1 else "heads " + ", ".join(map(str, members[:4]))
    axes.set_title(name + (", ..." if len(members) > 4 else ""), loc="left", fontsize=9, color=_INK)
    # Panels of a window are narrow; its middle is where a segment ends.
    _ticks(axes, window[:: max(1, len(window) // (2 if window.start else 4))])
    _quiet(axes)


def _corner(branches: list[Branch], length: int) -> range:
    """A window around the end of the first shortest segment, where the branches part."""
    start = min(max(0, branches[0].segment_length - _WINDOW // 2), length - _WINDOW)
    return range(start, start + _WINDOW)


def _draw_overview(
    place: FigureBase, pattern: Pattern, branches: list[Branch], colors: list[str], heads: int, length: int,
    window: range, is_causal: bool,
) -> None:  # fmt: skip
    axes = place.add_subplot(anchor="NE")
    cells = min(_CELLS, length)
    edges = np.linspace(0, length, cells + 1).astype(np.int64)
    pairs = np.zeros((len(branches), cells, cells))
    for index, branch in enumerate(branches):
        for head in range(heads):
            pairs[index] += _cell_pairs(branch, pattern.offset(branch, head, heads), edges)
    best = np.where(pairs.any(axis=0), pairs.argmax(axis=0) + 1, 0)
    if is_causal:
        best[np.triu_indices(cells, 1)] = -1
    axes.imshow(
        best, cmap=ListedColormap(["white", _EMPTY, *colors]), vmin=-1, vmax=len(branches), interpolation="nearest",
        extent=(0, length, length, 0),
    )  # fmt: skip
    per_cell = f"{'about ' if length % cells else ''}{round(length / cells):,}"
    about = f"whole sequence at reduced resolution: a cell is {per_cell} x {per_cell.split()[-1]} tokens,\n"
    about += "coloured by the branch with the most pairs in it, over all heads"
    place.suptitle(about, x=0.02, ha="left", fontsize=9, color=_FAINT)
    axes.set(xlabel="key position (tokens)", ylabel="query position (tokens)")
    _ticks(axes, [length * quarter // 4 for quarter in range(5)])
    # The window itself would be a dot in a long sequence.
    side = max(len(window), length / 40)
    corner = min(max(0, (window.start + window.stop - side) / 2), length - side)
    axes.add_patch(Rectangle((corner, corner), side, side, fill=False, color=_INK, linewidth=1.2))
    _quiet(axes)


def _cell_pairs(branch: Branch, offset: int, edges: np.ndarray) -> np.ndarray:
    """Pairs of one head in every cell (query bin, key bin), both directions.

    Two different bins share at most one segment, so their pairs are an outer product: what the earlier bin holds of its
    last segment times what the later bin holds of its first.
    """
    starts, ends = edges[:-1], edges[1:]
    first, last = starts // branch.segment_length, (ends - 1) // branch.segment_length
    head_part = _selected(branch, offset, starts, np.minimum(ends, (first + 1) * branch.segment_length))
    tail_part = _selected(branch, offset, np.maximum(starts, last * branch.segment_length), ends)
    pairs = np.where(first[:, None] == last, np.outer(head_part, tail_part).astype(float), 0.0)
    pairs = np.tril(pairs, -1)
    whole = float(branch.rows(branch.segment_length, offset)) ** 2
    inside = np.maximum(0, last - first - 1) * whole + head_part.astype(float) ** 2
    inside += np.where(last > first, tail_part.astype(float) ** 2, 0.0)
    return pairs + pairs.T + np.diag(inside)


def _selected(branch: Branch, offset: int, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Selected positions in [start, end), which lies in one segment."""
    base = starts // branch.segment_length * branch.segment_length + offset
    before, through = (np.maximum(0, -(-(edge - base) // branch.dilation_rate)) for edge in (starts, ends))
    counts: np.ndarray = through - before
    return counts


def _bit_counts(mask: int, start: int, edges: np.ndarray) -> np.ndarray:
    """Set bits of the mask, whose bit 0 is position ``start``, in each bin of positions."""
    size = mask.bit_length()
    raw = np.frombuffer(mask.to_bytes(-(-size // 8), "little"), dtype=np.uint8)
    below = np.concatenate([[0], np.cumsum(np.unpackbits(raw, bitorder="little")[:size], dtype=np.int64)])
    counts: np.ndarray = np.diff(below[np.clip(edges - start, 0, size)])
    return counts


def _branch_colors(count: int) -> list[str]:
    if count <= len(_COLORS):
        return list(_COLORS[:count])
    return [to_hex(colormaps["viridis"](index / count)) for index in range(count)]


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=_INK)
    return figure


def _legend(figure: Figure, handles: list[Patch]) -> None:
    figure.legend(handles=handles, loc="outside lower left", ncols=5, frameon=False, fontsize=9, labelcolor=_INK)


def _quiet(axes: Axes) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, labelsize=8, colors=_FAINT)
    axes.xaxis.label.set(size=9, color=_INK)
    axes.yaxis.label.set(size=9, color=_INK)


def _ticks(axes: Axes, values: Sequence[int]) -> None:
    labels = [f"{value:,}" for value in values]
    axes.set_xticks(values, labels)
    axes.set_yticks(values, labels)


def _short(value: float, _: object = None) -> str:
    for size, unit in ((2**30, "Gi"), (2**20, "Mi"), (2**10, "Ki")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _save(figure: Figure, path: str | Path) -> Path:
    figure.savefig(path, dpi=160)
    return Path(path)
