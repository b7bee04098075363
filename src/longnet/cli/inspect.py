"""``longnet inspect``: cost, coverage and receptive field of a pattern, as tables and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from longnet.cli.inspect_layers import Layers, describe, show
from longnet.cli.layer_options import BY_LAYER, integers, layers_of
from longnet.cli.once import error_text
from longnet.geometry.cost import Cost, KeysPerQuery, cost, keys_per_query
from longnet.geometry.coverage import Coverage, coverage
from longnet.geometry.pattern import Pattern
from longnet.geometry.reach import LONGEST_REACH, LayerReach, receptive_field
from longnet.geometry.suggest import spanning_pattern, suggest_pattern

Found = TypeVar("Found")


def inspect(
    context: typer.Context,
    segments: Annotated[
        str | None, typer.Option(help="Segment length of each branch in tokens: 2048,4096; none for no end.")
    ] = None,
    rates: Annotated[str | None, typer.Option(help="Dilation rate of each branch, as many as segments: 1,2.")] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of the sequence (left out: the longest segment, or 16 windows).")
    ] = None,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 12,
    head_dim: Annotated[int, typer.Option(help="Size of one head.")] = 64,
    kv_heads: Annotated[int | None, typer.Option(help="Key/value heads (left out: as many as heads).")] = None,
    layers: Annotated[int, typer.Option(help="Attention layers for the receptive field.")] = 4,
    bidirectional: Annotated[bool, typer.Option("--bidirectional", help="Keys after the query count too.")] = False,
    head_offsets: Annotated[
        str, typer.Option(help="Offset of each head: interleaved, blocked or grouped.")
    ] = "interleaved",
    window: Annotated[int | None, typer.Option(help="Tokens of a window, also of sliding and strided layers.")] = None,
    all_queries: Annotated[
        bool, typer.Option("--all-queries", help="Every token is a query of every branch; keys alone are dilated.")
    ] = False,
    dilation_block: Annotated[int, typer.Option(help="Tokens of the blocks that dilation counts.")] = 1,
    segment_offset: Annotated[int, typer.Option(help="Tokens by which segments begin earlier.")] = 0,
    layer_types: Annotated[
        str | None, typer.Option(help="What each layer computes, repeated: sliding_attention,strided_attention.")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Strided layers read every so-many-th block.")] = None,
    stride_block: Annotated[int | None, typer.Option(help="Tokens of such a block.")] = None,
    shift_keys: Annotated[
        bool, typer.Option("--shift-keys", help="Keys of strided and full layers hold the token before too.")
    ] = False,
    model: Annotated[
        Path | None, typer.Option(help="Run folder, or JSON or TOML file of LongNetConfig fields: its layers.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="A preset of longnet train, base, small, tiny or nano: its layers.")
    ] = None,
    stack: Annotated[
        str | None,
        typer.Option(help="Of the preset: balanced, light or longnet.", show_default="balanced, longnet for nano"),
    ] = None,
    suggest_budget: Annotated[
        int | None, typer.Option(help="Suggest a pattern for --length with at most this many keys per query.")
    ] = None,
    out: Annotated[Path, typer.Option(help="File for the picture of the pattern.")] = Path("pattern.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show what a dilated-attention pattern costs, which positions it covers, how far it sees; draw it as PNG.

    With --model, --preset or --layer-types, or a pattern that LongNet's paper does not have, it shows cost, cache and reach by
    layer.
    """
    causal = not bidirectional
    sources = {name: context.get_parameter_source(name) for name in context.params}
    named = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    if named & BY_LAYER:
        try:
            _show_layers(layers_of(context.params, named, causal), out, as_json)
        except (ValueError, TypeError, OSError) as error:
            _fail(error_text(error))
        return
    try:
        pattern, length = _pattern(segments, rates, length, heads, head_offsets, suggest_budget)
        spent = cost(pattern, heads, length, head_dim, is_causal=causal, kv_heads=kv_heads)
        # No key is read across a period, so short segments are cheap to follow in a long sequence too.
        followed = length if min(length, pattern.period) <= LONGEST_REACH else LONGEST_REACH
        seen = receptive_field(pattern, heads, followed, layers, causal)
        from longnet.figures import plot_pattern

        figure = plot_pattern(pattern, heads, length, out, is_causal=causal)
    except (ValueError, OSError) as error:
        _fail(error_text(error))
    keys = _or_reason(lambda: keys_per_query(pattern, heads, length, causal))
    covered = _or_reason(lambda: coverage(pattern, heads, length))

    spanning = spanning_pattern(pattern, heads, length)
    if as_json:
        answer = _as_dict(pattern, heads, length, causal, spent, keys, covered, seen, followed, spanning)
        typer.echo(json.dumps(answer | {"figure": str(figure)}, indent=2))
        return
    console = Console()
    title = "Suggested pattern" if suggest_budget else "Pattern"
    console.print(f"\n[bold]{title}[/]  {_options(pattern)}", soft_wrap=True)
    direction = "causal" if causal else "bidirectional"
    console.print(f"{length:,} tokens, {heads} heads, {direction}, {head_offsets} offsets\n")
    if spanning is not None:
        share = cost(spanning, heads, length, head_dim, is_causal=causal, kv_heads=kv_heads).ratio
        console.print(
            f"Every branch starts a segment at each multiple of {pattern.period:,}: no token depends on tokens before that, "
            f"however many layers there are. A pattern that spans all {length:,} tokens: {_options(spanning)}, "
            f"{float(share):.2%} of dense attention's work (this one: {float(spent.ratio):.2%}).\n",
            style="bold red", markup=False, soft_wrap=True,
        )  # fmt: skip
    console.print(_cost_table(spent, keys, heads, length))
    if isinstance(keys, str):
        console.print(f"Fewest and most keys are not shown: {keys}\n", style="yellow", markup=False)
    _print_coverage(console, covered, heads)
    console.print(_reach_table(seen, followed))
    scope = "earlier tokens" if causal else "tokens"
    console.print(
        f"Counts the {scope} that it depends on after each layer, itself included; heads mix between layers.",
        style="dim",
    )
    if followed < length:
        console.print(
            f"Followed for the first {followed:,} tokens only, the most this command follows.", style="yellow"
        )
    console.print("\nPicture of the pattern: ", end="")
    console.print(str(figure), style="bold", markup=False, soft_wrap=True)


def _show_layers(stack: Layers, out: Path, as_json: bool) -> None:
    report = describe(stack)
    from longnet.figures.patterns import plot_layers

    pictures = plot_layers(stack.kinds(), stack.length, out, is_causal=stack.is_causal)
    if as_json:
        typer.echo(json.dumps(report | {"figures": {name: str(path) for name, path in pictures.items()}}, indent=2))
        return
    show(stack, report, pictures, _count, _bytes)


def _or_reason(compute: Callable[[], Found]) -> Found | str:
    """The result, or the reason why it cannot be computed for this pattern."""
    try:
        return compute()
    except ValueError as error:
        return str(error)


def _options(pattern: Pattern) -> str:
    segments, rates = (",".join(map(str, values)) for values in (pattern.segment_lengths, pattern.dilation_rates))
    return f"--segments {segments} --rates {rates}"


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def _pattern(
    segments: str | None, rates: str | None, length: int | None, heads: int, head_offsets: str, budget: int | None
) -> tuple[Pattern, int]:
    if budget is not None:
        if segments is not None or rates is not None:
            raise ValueError("--suggest-budget chooses the pattern: leave out --segments and --rates")
        if length is None:
            raise ValueError("--suggest-budget needs the sequence length to reach: give --length")
        return suggest_pattern(length, budget, heads=heads, head_offsets=head_offsets), length
    if segments is None or rates is None:
        raise ValueError("a pattern needs both --segments and --rates, say --segments 2048,4096 --rates 1,2")
    pattern = Pattern.parse(integers("--segments", segments), integers("--rates", rates), head_offsets)
    return pattern, max(pattern.segment_lengths) if length is None else length


def _cost_table(spent: Cost, keys: KeysPerQuery | str, heads: int, length: int) -> Table:
    table = Table(title="Cost of one attention layer, one sequence", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("dilated", justify="right", style="cyan", no_wrap=True)
    table.add_column("dense", justify="right", no_wrap=True)
    table.add_column("what it means", style="dim")
    dilated, dense = spent.dilated, spent.dense
    mean = [work.pairs / (heads * length) for work in (dilated, dense)]
    table.add_row("keys per query", f"{mean[0]:,.1f}", f"{mean[1]:,.1f}", "tokens a query reads, on average over heads")
    if isinstance(keys, KeysPerQuery):
        table.add_row("  fewest, most", f"{keys.min:,}, {keys.max:,}", "", "a token read by two branches counts twice")
    table.add_row("score pairs", _count(dilated.pairs), _count(dense.pairs), "query-key products, all heads")
    for name, field in (("forward", "forward_flops"), ("backward", "backward_flops")):
        values = [_count(getattr(work, field)) for work in (dilated, dense)]
        products = "two" if name == "forward" else "five"
        table.add_row(f"{name} FLOPs", *values, f"{products} matrix products over the pairs")
    for name in ("forward", "backward"):
        values = [_bytes(getattr(work, f"{name}_bytes")) for work in (dilated, dense)]
        table.add_row(f"{name} traffic", *values, "each 2-byte tensor moved once; the same for both")
    table.add_row("share of dense", f"{float(spent.ratio):.2%}", "", "dilated FLOPs over dense FLOPs")
    return table


def _print_coverage(console: Console, covered: Coverage | str, heads: int) -> None:
    console.print("\n[bold]Coverage[/] [dim](a head outputs zeros at positions that none of its branches selects)[/]")
    if isinstance(covered, str):
        console.print(f"Not shown: {covered}\n", style="yellow", markup=False)
        return
    if not any(covered.heads):
        console.print(f"Every one of the {heads} heads selects every position.\n")
        return
    groups: dict[tuple[str, float], list[int]] = {}
    for head, missed in enumerate(covered.heads):
        groups.setdefault((missed.description, float(1 - missed.fraction)), []).append(head)
    table = Table()
    table.add_column("head")
    table.add_column("covered", justify="right", style="cyan")
    table.add_column("does not select")
    for (description, share), members in groups.items():
        table.add_row(", ".join(map(str, members)), f"{share:.2%}", description)
    console.print(table)
    missed = covered.uncovered
    if missed:
        console.print(
            f"No head covers {missed.description}: {missed.count:,} of {missed.positions:,} positions "
            f"({float(missed.fraction):.2%}) get no attention output at all. "
            "Add a branch with rate 1, or choose rates that divide the number of heads.\n",
            style="bold red", markup=False,
        )  # fmt: skip
    else:
        console.print("Every position is covered by at least one head.\n")


def _reach_table(seen: tuple[LayerReach, ...], length: int) -> Table:
    table = Table(title=f"Receptive field of position {length - 1:,}", title_justify="left", title_style="bold")
    for name in ("layers", "tokens reached", "share", "farthest token"):
        table.add_column(name, justify="right", style="cyan" if name == "share" else None)
    for layer in seen:
        row = (layer.layer, f"{layer.tokens:,}", f"{float(layer.fraction):.2%}", f"{layer.farthest:,} away")
        table.add_row(*map(str, row))
    return table


def _as_dict(
    pattern: Pattern, heads: int, length: int, causal: bool, spent: Cost, keys: KeysPerQuery | str, covered: Coverage | str,
    seen: tuple[LayerReach, ...], followed: int, spanning: Pattern | None,
) -> dict[str, Any]:  # fmt: skip
    extremes = {"min": keys.min, "max": keys.max} if isinstance(keys, KeysPerQuery) else {"not_known": keys}
    return {
        "segment_lengths": pattern.segment_lengths,
        "dilation_rates": pattern.dilation_rates,
        "head_offsets": pattern.head_offsets,
        "length": length,
        "heads": heads,
        "causal": causal,
        "keys_per_query": {"mean": spent.dilated.pairs / (heads * length), **extremes},
        "cost": {"dilated": vars(spent.dilated), "dense": vars(spent.dense), "ratio": float(spent.ratio)},
        "coverage": {"not_known": covered} if isinstance(covered, str) else _coverage_dict(covered),
        "receptive_field": {
            "position": followed - 1,
            "layers": [vars(layer) | {"fraction": float(layer.fraction)} for layer in seen],
            "limited_to": None if spanning is None else pattern.period,
        },
        "suggestion": None
        if spanning is None
        else {"segment_lengths": spanning.segment_lengths, "dilation_rates": spanning.dilation_rates},
    }


def _coverage_dict(covered: Coverage) -> dict[str, Any]:
    missed = covered.uncovered
    return {
        "heads": [float(share) for share in covered.fractions],
        "uncovered": {"count": missed.count, "positions": missed.positions, "description": missed.description},
    }


def _count(value: int) -> str:
    for power, unit in ((15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if value >= 10**power:
            return f"{value / 10**power:,.2f} {unit}"
    return f"{value:,}"


def _bytes(value: int) -> str:
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value >= 1 << power:
            return f"{value / (1 << power):,.1f} {unit}"
    return f"{value:,} B"
