"""``longnet inspect`` of layers that differ, or of one pattern beyond LongNet's paper: cost, cache and reach by layer."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from longnet.geometry.cost import score_pairs
from longnet.geometry.layout import make_layout
from longnet.geometry.reach import LONGEST_REACH, LayerAttention, stack_reach, uncovered_by_stack

# Bytes of an element of keys and values.
_ELEMENT = 2


@dataclass(frozen=True)
class Layers:
    """A stack of layers and the sequence that it reads.

    Attributes:
        names: of each layer's type.
        layers: what they compute.
        kv_heads: key/value heads of each.
        head_dim: D.
        length: tokens N.
        is_causal: whether keys after the query are left out.
    """

    names: tuple[str, ...]
    layers: tuple[LayerAttention, ...]
    kv_heads: tuple[int, ...]
    head_dim: int
    length: int
    is_causal: bool

    def kinds(self) -> dict[str, LayerAttention]:
        """Each kind of layer, by a name of its own."""
        named: dict[str, LayerAttention] = {}
        for name, layer in zip(self.names, self.layers, strict=True):
            if layer not in named.values():
                named[name if name not in named else f"{name}_{len(named)}"] = layer
        return named


def describe(stack: Layers) -> dict[str, Any]:
    """Everything that is shown, as JSON keeps it.

    Raises:
        ValueError: numbers that are out of range.
    """
    layers = [_describe_layer(stack, number) for number in range(len(stack.layers))]
    followed = min(stack.length, LONGEST_REACH)
    start, masks = stack_reach(stack.layers, followed, stack.is_causal)
    reached = [mask << start for mask in masks[1:]]
    for layer, mask in zip(layers, reached, strict=True):
        layer["reach"] = _describe_reach(mask, followed)
    uncovered = uncovered_by_stack(stack.layers, followed)
    pairs, dense = (sum(layer[name] for layer in layers) for name in ("pairs", "dense_pairs"))
    return {
        "length": stack.length,
        "causal": stack.is_causal,
        "layers": layers,
        "pairs": pairs,
        "ratio": float(Fraction(pairs, dense)),
        "cache_bytes": sum(layer["cache_bytes"] for layer in layers) if stack.is_causal else None,
        "followed": followed,
        "uncovered": uncovered.bit_count(),
        "unreached": followed - reached[-1].bit_count(),
    }


def _describe_layer(stack: Layers, number: int) -> dict[str, Any]:
    layer, kv_heads, length = stack.layers[number], stack.kv_heads[number], stack.length
    pattern, heads = layer.pattern, layer.heads
    pairs = score_pairs(pattern, heads, length, stack.is_causal, segment_offset=layer.segment_offset)
    dense = heads * (length * (length + 1) // 2 if stack.is_causal else length * length)
    row = 2 * stack.head_dim * _ELEMENT
    rows = make_layout(pattern.shortened(length, layer.segment_offset), heads, kv_heads, length).rows
    return {
        "layer": number,
        "type": stack.names[number],
        "segment_lengths": pattern.given_lengths,
        "dilation_rates": pattern.dilation_rates,
        "head_offsets": pattern.head_offsets,
        "window": pattern.window,
        "dilated_queries": pattern.dilated_queries,
        "dilation_block": pattern.block,
        "segment_offset": layer.segment_offset,
        "shift_keys": layer.shift_keys,
        "positions": layer.positions,
        "heads": heads,
        "kv_heads": kv_heads,
        "pairs": pairs,
        "dense_pairs": dense,
        "ratio": float(Fraction(pairs, dense)),
        # Query, key, value and out, each moved once.
        "forward_bytes": 2 * (heads + kv_heads) * length * stack.head_dim * _ELEMENT + 4 * heads * length,
        "cache_bytes": rows * row if stack.is_causal else None,
    }


def _describe_reach(mask: int, length: int) -> dict[str, Any]:
    """Of the last of ``length`` positions."""
    missing = ((1 << length) - 1) & ~mask
    return {
        "tokens": mask.bit_count(),
        "fraction": float(Fraction(mask.bit_count(), length)),
        "farthest": length - (mask & -mask).bit_length(),
        "nearest_missing": length - missing.bit_length() if missing else None,
    }


def show(stack: Layers, report: dict[str, Any], pictures: dict[str, Path], count: Any, in_bytes: Any) -> None:
    """Print it as tables; ``count`` and ``in_bytes`` write large numbers."""
    console = Console()
    direction = "causal" if stack.is_causal else "bidirectional"
    console.print(f"\n[bold]{len(stack.layers)} layers[/]  {stack.length:,} tokens, {direction}\n")
    if report["uncovered"]:
        _warn(
            console,
            f"No head of any layer covers {report['uncovered']:,} of the first {report['followed']:,} positions.",
        )
    if report["unreached"]:
        nearest = report["layers"][-1]["reach"]["nearest_missing"]
        _warn(
            console,
            f"No path of the layers leads from {report['unreached']:,} of {report['followed']:,} tokens to the last one; the "
            f"nearest of them is {nearest:,} tokens away. A full or strided layer, a wider window, longer segments or more "
            "layers reach farther.",
        )
    cost = Table(title="Cost by layer, one sequence", title_justify="left", title_style="bold")
    for name in ("layer", "type", "what it reads", "pairs", "share of dense", "forward traffic", "cache"):
        cost.add_column(name, justify="left" if name in ("type", "what it reads") else "right", overflow="fold")
    for layer in report["layers"]:
        kept = "" if layer["cache_bytes"] is None else in_bytes(layer["cache_bytes"])
        cost.add_row(
            str(layer["layer"]), layer["type"], _words(layer), count(layer["pairs"]), f"{layer['ratio']:.2%}",
            in_bytes(layer["forward_bytes"]), kept,
        )  # fmt: skip
    total = "" if report["cache_bytes"] is None else in_bytes(report["cache_bytes"])
    cost.add_row("all", "", "", count(report["pairs"]), f"{report['ratio']:.2%}", "", total, style="cyan")
    console.print(cost)
    console.print(
        f"Caches hold what a stream of one row has in reach after {stack.length:,} tokens, in 2-byte elements.\n"
        if stack.is_causal
        else "Bidirectional layers have no cache.\n",
        style="dim",
    )
    reach = Table(
        title=f"What position {report['followed'] - 1:,} depends on", title_justify="left", title_style="bold"
    )
    for name in ("layers", "tokens reached", "share", "farthest token", "nearest token not reached"):
        reach.add_column(name, justify="right", style="cyan" if name == "share" else None)
    for layer in report["layers"]:
        seen = layer["reach"]
        missing = "none" if seen["nearest_missing"] is None else f"{seen['nearest_missing']:,} away"
        share, farthest = f"{seen['fraction']:.2%}", f"{seen['farthest']:,} away"
        reach.add_row(str(layer["layer"] + 1), f"{seen['tokens']:,}", share, farthest, missing)
    console.print(reach)
    console.print("Each row is for the layers up to that one; the position itself is counted.", style="dim")
    if report["followed"] < stack.length:
        console.print(f"Followed for the first {report['followed']:,} tokens only.", style="yellow")
    for name, picture in pictures.items():
        console.print(f"\nPicture of {name}: ", end="")
        console.print(str(picture), style="bold", markup=False, soft_wrap=True)


def _words(layer: dict[str, Any]) -> str:
    parts = [] if layer["window"] is None else [f"window {layer['window']:,}"]
    for length, rate in zip(layer["segment_lengths"], layer["dilation_rates"], strict=True):
        if length is None:
            of_all = "all tokens" if rate == 1 else f"1 of {rate:,} of all tokens"
            parts.append(
                of_all if layer["dilation_block"] == 1 else f"1 of {rate:,} blocks of {layer['dilation_block']:,}"
            )
        else:
            parts.append(f"{length:,}/{rate:,}")
    if layer["segment_offset"]:
        parts.append(f"offset {layer['segment_offset']:,}")
    notes = ["shifted keys"] * layer["shift_keys"] + ["no positions"] * (not layer["positions"])
    return "; ".join((", ".join(parts), *notes))


def _warn(console: Console, text: str) -> None:
    console.print(text + "\n", style="bold red", markup=False, soft_wrap=True)
