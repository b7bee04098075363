"""Keys, cached bytes and sent bytes against a length or a number of ranks, beside other schemes. Log-log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from longnet.checks import check_int
from longnet.figures.style import FAINT, new_figure, quiet, save, short
from longnet.geometry.cost import score_pairs
from longnet.geometry.layout import make_layout
from longnet.geometry.pattern import Pattern

_OURS = "#12485a"
# Colours of the other curves.
_OTHERS = (FAINT, "#d1603d", "#e9b44c")


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
    ordered = _ordered("lengths", lengths)
    mean = [score_pairs(pattern, heads, n, is_causal) / (heads * n) for n in ordered]
    dense = [(n + 1) / 2 if is_causal else float(n) for n in ordered]
    about = ""
    if mean[-1]:
        times = dense[-1] / mean[-1]
        about = (
            f"at {ordered[-1]:,} tokens dense attention reads {times:,.{0 if times >= 10 else 1}f} times as many keys"
        )
    title = f"Keys per query ({heads} heads, {'causal' if is_causal else 'bidirectional'})"
    names = ("sequence length (tokens)", "keys per query (mean)")
    return _plot(ordered, {"dilated": mean, "dense": dense}, path, title, about, names)


def plot_cache(
    pattern: Pattern,
    heads: int,
    head_dim: int,
    positions: Sequence[int],
    path: str | Path,
    *,
    kv_heads: int | None = None,
    bytes_per_element: int = 2,
) -> Path:
    """Draw the bytes that one layer caches of a causal stream against the position, beside a dense KV cache.

    Args:
        pattern, heads, path: as in :func:`plot_pattern`.
        head_dim: D.
        positions: tokens read so far, at least two different numbers.
        kv_heads: key/value heads Hk, a divisor of ``heads``; ``heads`` when None.
        bytes_per_element: 2 for bfloat16.

    Returns:
        ``path`` as a Path.

    Raises:
        ValueError: fewer than two different positions, or ``heads`` not divisible by ``kv_heads``.
    """
    ordered = _ordered("positions", positions)
    kv_heads = heads if kv_heads is None else check_int("kv_heads", kv_heads, 1)
    if check_int("heads", heads, 1) % kv_heads:
        raise ValueError(f"heads={heads} is not divisible by kv_heads={kv_heads}: expected a divisor of heads")
    row = 2 * check_int("head_dim", head_dim, 1) * check_int("bytes_per_element", bytes_per_element, 1)
    pattern = pattern.grouped(heads, kv_heads)
    bounded = [float(make_layout(pattern, heads, kv_heads, n).rows * row) for n in ordered]
    dense = [float(kv_heads * n * row) for n in ordered]
    about = f"at position {ordered[-1]:,} a dense cache is {dense[-1] / bounded[-1]:,.0f} times as large"
    title = f"Cache of one layer ({heads} heads of {head_dim} channels)"
    names = ("position (tokens read so far)", "keys and values kept")
    return _plot(ordered, {"dilated": bounded, "dense": dense}, path, title, about, names, unit="B")


def plot_traffic(ranks: Sequence[int], sent: Mapping[str, Sequence[float]], path: str | Path, about: str) -> Path:
    """Draw the bytes that a rank sends against the number of ranks, one curve a scheme, the first emphasised.

    Args:
        ranks: numbers of ranks, ascending.
        sent: by the scheme's name the bytes for each number of ranks; up to four schemes.
        path: as in :func:`plot_pattern`.
        about: one line above the picture that describes the sequence.

    Returns:
        ``path`` as a Path.

    Raises:
        ValueError: fewer than two different numbers of ranks.
    """
    ordered = _ordered("ranks", ranks)
    names = ("ranks that share one sequence", "sent by a rank")
    return _plot(ordered, sent, path, "What a rank sends per layer, forward", about, names, unit="B")


def _ordered(name: str, values: Sequence[int]) -> list[int]:
    ordered = sorted(set(values))
    if len(ordered) < 2:
        raise ValueError(f"{name}={tuple(values)} is too few to draw: expected at least two different {name}")
    return ordered


def _plot(
    x: Sequence[int],
    curves: Mapping[str, Sequence[float]],
    path: str | Path,
    title: str,
    about: str,
    names: tuple[str, str],
    unit: str = "",
) -> Path:
    figure = new_figure(6.4, 4.4, title)
    axes = figure.add_subplot()
    own, *others = curves.values()
    if others:
        axes.fill_between(x, own, others[0], color="#2a9d8f", alpha=0.08, linewidth=0)
    colors = dict(zip(curves, (_OURS, *_OTHERS), strict=False))
    # The first curve lies on top.
    for name, values in reversed(list(curves.items())):
        ours = colors[name] == _OURS
        axes.plot(x, values, color=colors[name], linewidth=2.2 if ours else 1.6, linestyle="-" if ours else (0, (4, 3)))
        _label(axes, f"{name}\n{short(values[-1])}{unit}", (x[-1], values[-1]), colors[name])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set(xlim=(x[0], x[-1]), xlabel=names[0], ylabel=names[1])
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value) + unit))
    axes.set_title(about, loc="left", fontsize=9, color=FAINT)
    quiet(axes)
    axes.grid(color="#e4e3df", linewidth=0.7)
    return save(figure, path)


def _label(axes: Axes, text: str, at: tuple[float, float], color: str) -> None:
    axes.annotate(text, at, xytext=(6, 0), textcoords="offset points", va="center", color=color, fontsize=9)
