"""Traffic between the shards of one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, MultipleLocator, NullLocator

from longnet.checks import check_int
from longnet.figures.style import EMPTY, FAINT, new_figure, quiet, save, short
from longnet.geometry.cost import score_pairs_by_shard
from longnet.geometry.pattern import Pattern
from longnet.geometry.shards import Shards, rows_sent

MOST_RANKS = 64


def plot_shards(
    pattern: Pattern,
    heads: int,
    head_dim: int,
    shard_lengths: Sequence[int],
    path: str | Path,
    *,
    kv_heads: int | None = None,
    is_causal: bool = True,
    bytes_per_element: int = 2,
) -> Path:
    """Draw the bytes that every rank sends to every other in a forward pass of one layer, and their sum for each rank.

    The title says how many times the mean work the busiest rank has, in score pairs. In causal attention ranks with later
    queries of a segment have more: see :func:`longnet.geometry.score_pairs_by_shard`.

    Args:
        pattern, heads, path, is_causal: as in :func:`plot_pattern`.
        head_dim: D.
        shard_lengths: tokens of every rank's shard, in rank order; at most 64 ranks.
        kv_heads: key/value heads Hk, a divisor of ``heads``; ``heads`` when None.
        bytes_per_element: 2 for bfloat16.

    Returns:
        ``path`` as a Path.

    Raises:
        ValueError: fewer than two ranks or more than 64.
    """
    ranks = len(shard_lengths)
    if not 2 <= ranks <= MOST_RANKS:
        raise ValueError(f"shard_lengths holds {ranks} lengths: expected 2 to {MOST_RANKS}, one per rank")
    shards = Shards(tuple(shard_lengths))
    kv_heads = heads if kv_heads is None else kv_heads
    pattern = pattern.grouped(heads, kv_heads)
    row = 2 * check_int("head_dim", head_dim, 1) * check_int("bytes_per_element", bytes_per_element, 1)
    sent = np.zeros((ranks, ranks))
    for rank in range(ranks):
        for receiver, rows in rows_sent(pattern, heads, kv_heads, shards, rank, is_causal).items():
            sent[rank, receiver] = rows * row
    title = f"What travels between {ranks} shards, per layer, forward ({heads} heads of {head_dim} channels)"
    figure = new_figure(9.5, 4.9, title)
    matrix, bars = figure.subplots(1, 2, width_ratios=[1.5, 1])
    shade = LinearSegmentedColormap.from_list("sent", ["#cfe3e0", "#2a9d8f", "#12485a"])
    most = sent.max() or 1.0
    least = sent[sent > 0].min() if sent.any() else 1.0
    norm = LogNorm(min(least, most / 2), most)
    image = matrix.imshow(np.ma.masked_equal(sent, 0), cmap=shade, norm=norm, interpolation="nearest")
    # Masked cells are transparent.
    matrix.set(xlabel="to rank", ylabel="from rank", facecolor=EMPTY)
    matrix.set_title("pale grey: nothing", loc="left", fontsize=9, color=FAINT)
    scale = figure.colorbar(image, ax=matrix, shrink=0.85, ticks=LogLocator(2))
    scale.ax.yaxis.set_minor_locator(NullLocator())
    scale.outline.set_visible(False)
    scale.ax.tick_params(length=0, labelsize=8, colors=FAINT, which="both")
    scale.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value) + "B"))
    bars.barh(range(ranks), sent.sum(1), color="#12485a", height=0.72)
    bars.set(ylim=(ranks - 0.5, -0.5), xlabel="sent by a rank in all", ylabel="rank")
    # Ticks are round in binary units, the units of their labels.
    bars.xaxis.set_major_locator(MultipleLocator(2.0 ** np.ceil(np.log2(max(sent.sum(1).max(), 1) / 5))))
    bars.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value) + "B"))
    total, pairs = shards.total, score_pairs_by_shard(pattern, heads, shard_lengths, is_causal)
    kind = f"{total:,} tokens, {'causal' if is_causal else 'bidirectional'}"
    busiest = max(pairs) * ranks / (sum(pairs) or 1)
    bars.set_title(
        f"{kind}\nwork of the busiest rank: {busiest:.2f} times the mean", loc="left", fontsize=9, color=FAINT
    )
    for axes in (matrix, bars):
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        quiet(axes)
    matrix.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    bars.grid(axis="x", color="#e4e3df", linewidth=0.7)
    bars.set_axisbelow(True)
    return save(figure, path)
