"""Printing: tables with rich where it is installed, else in plain lines (GPU machines need torch and triton alone)."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable

from benchmarks import report
from benchmarks.cases import Record
from benchmarks.harness import Step


def has_rich() -> bool:
    return importlib.util.find_spec("rich") is not None


def run(steps: list[Step], after: Callable[[], None] | None = None) -> None:
    """Every step in turn, its name on stderr; ``after`` is called when one is done.

    Nothing is drawn while a step runs: it would take time from what is timed.
    """
    if not has_rich():
        print("rich is not installed: tables in plain lines", file=sys.stderr, flush=True)
    for number, step in enumerate(steps, 1):
        print(f"[{number}/{len(steps)}] {step.label} ...", end="", file=sys.stderr, flush=True)
        start = time.perf_counter()
        step.run()
        print(f" {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        if after is not None:
            after()


def show(result: Record) -> None:
    """The tables and what they say, on stdout; into a pipe or a file, which have no width to fold them to, in lines."""
    if not has_rich() or not sys.stdout.isatty():
        print(report.plain(result))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(report.header(result), markup=False)
    for table in report.tables(result):
        shown = Table(title=table.title, title_justify="left")
        for column in table.columns:
            shown.add_column(column, overflow="fold")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
        for note in table.notes:
            console.print(note, markup=False)
    for line in report.summary(result):
        console.print(line, markup=False)
