"""Which key each query reads, and which positions each head selects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import FigureBase
from matplotlib.patches import Patch, Rectangle

from longnet.checks import check_int
from longnet.figures.style import EMPTY, FAINT, INK, branch_colors, legend, new_figure, quiet, save, ticks
from longnet.geometry import Branch, Pattern
from longnet.geometry.pattern import Beyond
from longnet.geometry.reach import LayerAttention

EXACT_TOKENS = 128
_WINDOW = 48
_CELLS = 256
_PANELS = 16


def plot_pattern(
    pattern: Pattern, heads: int, length: int, path: str | Path, *, is_causal: bool = True, segment_offset: int = 0
) -> Path:
    """Draw which key each query reads, per head, coloured by branch. Heads with the same offsets share a panel.

    Up to 128 tokens every (query, key) pair is a cell; a pair of several branches has the longest segment's colour. Longer
    sequences have two parts. An overview at reduced resolution colours each cell by the branch with the most pairs in it.
    Beside it is an exact window of 48 tokens per head, around the end of the first shortest segment, where branches begin to
    differ. The titles say so.

    Args:
        pattern: the branches.
        heads: query heads H.
        length: tokens N.
        path: the picture's file; its suffix says the format (``.png``).
        is_causal: leave out the keys after the query.
        segment_offset: on the grid position ``p`` counts as ``p + segment_offset``.

    Returns:
        ``path`` as a Path.

    Raises:
        ValueError: more than 128 tokens of a pattern beyond the paper, or on a grid that is offset.
    """
    check_int("length", length, 1)
    beyond = pattern.beyond_paper or (Beyond("segment_offset", segment_offset) if segment_offset else None)
    if beyond is not None and length > EXACT_TOKENS:
        raise ValueError(f"length={length} with {beyond} is too long to draw: expected at most {EXACT_TOKENS}")
    groups: dict[tuple[int, ...], list[int]] = {}
    for head in range(check_int("heads", heads, 1)):
        groups.setdefault(tuple(pattern.offset(branch, head, heads) for branch in pattern.branches), []).append(head)
    shown = list(groups.values())[:_PANELS]
    branches = sorted(pattern.branches, key=lambda branch: (branch.segment_length, branch.dilation_rate))
    # The window lies lowest: its keys are the nearest.
    parts = [pattern.of(branch) for branch in branches]
    if pattern.window is not None:
        parts.insert(0, replace(pattern, branches=()))
    colors = branch_colors(len(parts))
    kind = "causal" if is_causal else "bidirectional"
    title = f"Dilated attention, {length:,} tokens, {heads} heads, {kind}"
    title += f", segment_offset {segment_offset:,}" if segment_offset else ""
    if len(shown) < len(groups):
        title += f" (the first {len(shown)} of {len(groups)} distinct heads)"

    count = len(shown)
    if length <= EXACT_TOKENS:
        columns, rows, window = min(count, 4), -(-count // min(count, 4)), range(length)
        side = 3.4 if count <= 2 else 2.4
        figure = new_figure(max(5.5, columns * side), rows * (side + 0.1) + 1.0, title)
        right: FigureBase = figure
    else:
        rows = 1 if count == 1 else max(2, int(count**0.5))
        columns, height = -(-count // rows), 5.4
        panels = max(3.5, columns * (height / rows + 0.1))
        figure = new_figure(height + 0.4 + panels, height + 1.2, title)
        grid = figure.add_gridspec(1, 2, width_ratios=[height + 0.4, panels])
        left, right = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
        window = _corner(branches, length)
        _draw_overview(left, pattern, branches, colors, heads, length, window, is_causal)
        about = f"per head, tokens {window.start:,} to {window.stop - 1:,} (the square):\n"
        about += "a cell is a pair, the longest segment on top"
        right.suptitle(about, x=0.02, ha="left", fontsize=9, color=FAINT)
    for index, members in enumerate(shown):
        axes = right.add_subplot(rows, columns, 1 + index)
        _draw_window(axes, parts, colors, members, heads, window, is_causal, segment_offset)
        below, first = index + columns >= count, index % columns == 0
        axes.tick_params(labelbottom=below, labelleft=first)
        axes.set(xlabel="key position" if below else "", ylabel="query position" if first else "")
    legend(figure, [Patch(color=color, label=_name(part)) for color, part in zip(colors, parts, strict=True)])
    return save(figure, path)


def plot_layers(
    layers: Mapping[str, LayerAttention], length: int, path: str | Path, *, is_causal: bool = True
) -> dict[str, Path]:
    """Draw several kinds of layers as :func:`plot_pattern` does: the first one as ``path``, others with their name behind its.

    Of patterns beyond the paper and offset grids only the first tokens are drawn, up to 128.

    Args:
        layers: by name.
        length, path, is_causal: as in :func:`plot_pattern`.

    Returns:
        The pictures, by name.
    """
    path = Path(path)
    pictures: dict[str, Path] = {}
    for name, layer in layers.items():
        pattern, offset = layer.pattern, layer.segment_offset
        is_paper = pattern.beyond_paper is None and not offset
        pictures[name] = plot_pattern(
            pattern,
            layer.heads,
            length if is_paper else min(length, EXACT_TOKENS),
            path.with_stem(f"{path.stem}_{name}") if pictures else path,
            is_causal=is_causal,
            segment_offset=offset,
        )
    return pictures


def _name(part: Pattern) -> str:
    """What one branch, or the window, is called."""
    if part.window is not None:
        return f"window {part.window:,}"
    (branch,), (length,) = part.branches, part.given_lengths
    name = f"rate {branch.dilation_rate:,}" if length is None else f"segment {length:,}, rate {branch.dilation_rate:,}"
    name += f", blocks of {branch.block:,}" if branch.block > 1 else ""
    return name if part.dilated_queries else f"{name}, all queries"


def plot_selection(pattern: Pattern, heads: int, length: int, path: str | Path) -> Path:
    """Draw which positions each head selects in every branch, one row a head, with the ends of segments.

    Args:
        pattern, heads, path: as in :func:`plot_pattern`.
        length: tokens N, at most 128.

    Returns:
        ``path`` as a Path.

    Raises:
        ValueError: more than 128 tokens.
    """
    if check_int("length", length, 1) > EXACT_TOKENS:
        raise ValueError(f"length={length} is too long to draw token by token: expected at most {EXACT_TOKENS}")
    check_int("heads", heads, 1)
    colors = branch_colors(len(pattern.branches))
    count = len(pattern.branches)
    figure = new_figure(
        9.5, 0.9 + count * (0.55 + 0.17 * heads), f"Which of {length:,} tokens each of {heads} heads selects"
    )
    for index, axes in enumerate(figure.subplots(count, 1, squeeze=False, sharex=True)[:, 0]):
        branch = pattern.branches[index]
        taken = [[pattern.selects(branch, head, heads, p) for p in range(length)] for head in range(heads)]
        axes.pcolormesh(
            np.arange(length + 1), np.arange(heads + 1), np.array(taken), cmap=ListedColormap([EMPTY, colors[index]]),
            vmin=0, vmax=1, edgecolors="white", linewidth=0.6,
        )  # fmt: skip
        for end in branch.starts(length)[1:]:
            axes.axvline(end, color=INK, linewidth=1.6)
        axes.set_ylim(heads, 0)
        axes.set_yticks(np.arange(heads) + 0.5, [str(head) for head in range(heads)])
        axes.set(ylabel="head", xlabel="position (a line ends a segment)" if index == count - 1 else "")
        name = f"segment {branch.segment_length:,}, rate {branch.dilation_rate:,}"
        axes.set_title(name, loc="left", fontsize=9, color=FAINT)
        quiet(axes)
    return save(figure, path)


def _draw_window(
    axes: Axes, parts: list[Pattern], colors: list[str], members: list[int], heads: int, window: range, is_causal: bool,
    segment_offset: int,
) -> None:  # fmt: skip
    """One head's exact pairs among the window's tokens. Longer segments lie on top: they are the sparser ones."""
    positions = np.arange(window.start, window.stop)
    cells = np.zeros((len(positions), len(positions)), dtype=np.int64)
    for index, part in enumerate(parts, 1):
        query, key = positions[:, None], positions
        cells[part.times_read(members[0], query, key, heads=heads, segment_offset=segment_offset) > 0] = index
    if is_causal:
        cells[positions[:, None] < positions] = -1
    _show_cells(axes, cells, colors, window.start - 0.5, window.stop - 0.5)
    name = f"head {members[0]}" if len(members) == 1 else "heads " + ", ".join(map(str, members[:4]))
    axes.set_title(name + (", ..." if len(members) > 4 else ""), loc="left", fontsize=9, color=INK)
    # Panels of a window are narrow; its middle is where a segment ends.
    ticks(axes, window[:: max(1, len(window) // (2 if window.start else 4))])
    quiet(axes)


def _show_cells(axes: Axes, cells: np.ndarray, colors: list[str], start: float, stop: float) -> None:
    """Cells (queries, keys): -1 is white, 0 pale, and i in the colour of branch i."""
    cmap, extent = ListedColormap(["white", EMPTY, *colors]), (start, stop, stop, start)
    axes.imshow(cells, cmap=cmap, vmin=-1, vmax=len(colors), interpolation="nearest", extent=extent)


def _corner(branches: list[Branch], length: int) -> range:
    """A window around the end of the first shortest segment, where branches begin to differ."""
    start = min(max(0, branches[0].segment_stop(0) - _WINDOW // 2), length - _WINDOW)
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
    _show_cells(axes, best, colors, 0, length)
    per_cell = f"{'about ' if length % cells else ''}{round(length / cells):,}"
    about = f"whole sequence at reduced resolution: a cell is {per_cell} x {per_cell.split()[-1]} tokens,\n"
    about += "coloured by the branch with the most pairs in it, over all heads"
    place.suptitle(about, x=0.02, ha="left", fontsize=9, color=FAINT)
    axes.set(xlabel="key position (tokens)", ylabel="query position (tokens)")
    ticks(axes, [length * quarter // 4 for quarter in range(5)])
    # The window itself would be a dot in a long sequence.
    side = max(len(window), length / 40)
    corner = min(max(0, (window.start + window.stop - side) / 2), length - side)
    axes.add_patch(Rectangle((corner, corner), side, side, fill=False, color=INK, linewidth=1.2))
    quiet(axes)


def _cell_pairs(branch: Branch, offset: int, edges: np.ndarray) -> np.ndarray:
    """Pairs of one head in every cell (query bin, key bin), both directions.

    Two different bins share at most one segment, so their pairs are an outer product: what the earlier bin holds of its
    last segment times what the later bin holds of its first.
    """
    starts, ends = edges[:-1], edges[1:]
    first, last = branch.segment_number(starts), branch.segment_number(ends - 1)
    head_part = _selected(branch, offset, starts, np.minimum(ends, branch.segment_stop(starts)))
    tail_part = _selected(branch, offset, np.maximum(starts, branch.segment_start(ends - 1)), ends)
    pairs = np.where(first[:, None] == last, np.outer(head_part, tail_part).astype(float), 0.0)
    pairs = np.tril(pairs, -1)
    whole = float(branch.rows(branch.segment_length, offset)) ** 2
    inside = np.maximum(0, last - first - 1) * whole + head_part.astype(float) ** 2
    inside += np.where(last > first, tail_part.astype(float) ** 2, 0.0)
    return pairs + pairs.T + np.diag(inside)


def _selected(branch: Branch, offset: int, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """How many positions in [start, end), which lies in one segment, are selected."""
    segments = branch.segment_start(starts)
    return branch.rows(ends - segments, offset) - branch.rows(starts - segments, offset)
