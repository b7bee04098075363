"""The command line: ``cpu`` measures, ``show`` prints a result again."""

from __future__ import annotations

import json
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from benchmarks import report
from benchmarks.cases import FULL, QUICK, Sizes
from benchmarks.checks import CheckFailed
from benchmarks.plot import plot_growth
from benchmarks.runner import SCHEMA, SECTIONS, Benchmark
from benchmarks.verdicts import summary

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_RESULTS = Path(__file__).resolve().parent / "results"
Section = StrEnum("Section", {name: name for name in SECTIONS})  # type: ignore[misc]
Dtype = StrEnum("Dtype", {name: name for name in FULL.dtypes})  # type: ignore[misc]


@app.callback(invoke_without_command=True)
def main(context: typer.Context) -> None:
    """What longnet costs: time, memory, growth and import time, each checked first and judged by its limit.

    Without a command: everything on this CPU, as `cpu` does.
    """
    if context.invoked_subcommand is None:
        cpu()


@app.command()
def cpu(
    section: Annotated[list[Section] | None, typer.Option(help="Only this part; may be repeated.")] = None,
    length: Annotated[list[int] | None, typer.Option(help="Only this N for speed and memory; may be repeated.")] = None,
    dtype: Annotated[list[Dtype] | None, typer.Option(help="Only this dtype; may be repeated.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Sizes of seconds, which judge nothing.")] = False,
    torchscale: Annotated[Path | None, typer.Option(help="A checkout of torchscale, timed beside.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON to write, its picture beside it.")] = None,
    plot: Annotated[bool, typer.Option(help="Draw time against length.")] = True,
) -> None:
    """Measure on this CPU: prints tables, writes JSON and a picture. A failed check prints no number and exits 1."""
    sizes = _sizes(QUICK if quick else FULL, length, dtype)
    sections = tuple(one.value for one in section) if section else SECTIONS
    whole = sizes == FULL and set(sections) == set(SECTIONS)
    console = Console()
    benchmark = Benchmark(sizes, sections, torchscale)
    try:
        _run(benchmark, Console(stderr=True))
    except CheckFailed as error:
        typer.echo(f"check failed, no number is given: {error}", err=True)
        raise typer.Exit(1) from None
    result = benchmark.result
    kind = "quick" if quick else "cpu" if whole else "partial"
    path = out or _RESULTS / f"{kind}-{result['date'][:10]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    _print(result, console)
    console.print(f"Written: {path}", soft_wrap=True)
    if plot and result["growth"]:
        plot_growth(result, path.with_suffix(".png"))
        console.print(f"Written: {path.with_suffix('.png')}", soft_wrap=True)


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="JSON of an earlier run.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Markdown for a README.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw time against length into this PNG.")] = None,
) -> None:
    """Print the tables of a result again."""
    result = _load(file)
    if markdown:
        typer.echo(report.markdown(result))
    else:
        _print(result, Console())
    if plot is not None:
        plot_growth(result, plot)


def _sizes(sizes: Sizes, lengths: list[int] | None, dtypes: list[Dtype] | None) -> Sizes:
    if lengths:
        for length in lengths:
            if length < sizes.base.block:
                raise typer.BadParameter(f"length {length} is below {sizes.base.block}, one block of the kernel")
        sizes = replace(sizes, speed_lengths=tuple(lengths), memory_lengths=tuple(lengths))
    if dtypes:
        sizes = replace(sizes, dtypes=tuple(one.value for one in dtypes))
    return sizes


def _run(benchmark: Benchmark, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Redrawn only between steps: a thread that draws would take time from what is timed.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        steps = benchmark.steps()
        task = progress.add_task("", total=len(steps))
        for step in steps:
            progress.update(task, description=step.label, refresh=True)
            step.run()
            progress.update(task, advance=1, refresh=True)


def _load(file: Path) -> dict[str, Any]:
    try:
        result = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{file}: {error}") from None
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise typer.BadParameter(f"{file} is no result of this benchmark: expected schema {SCHEMA}")
    return result


def _print(result: dict[str, Any], console: Console) -> None:
    # A pipe or a file has no width; a table cut to 80 columns would lose its numbers.
    console.width = console.width if console.is_terminal else 200
    console.print(report.header(result))
    for table in report.tables(result):
        shown = RichTable(title=table.title, title_justify="left")
        for column in table.columns:
            shown.add_column(column, overflow="fold")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
        for note in table.notes:
            console.print(note)
    for line in summary(result):
        console.print(line)
