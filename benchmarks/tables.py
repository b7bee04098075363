"""A table of text, as markdown and on a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """``brief`` names the columns that a README shows, all of them when empty."""

    title: str
    columns: Row
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    brief: Row = ()

    def markdown(self, brief: bool = False) -> str:
        """The table alone, without its title and notes."""
        chosen = self.brief if brief and self.brief else self.columns
        places = [self.columns.index(name) for name in chosen]
        rows = [tuple(row[place] for place in places) for row in self.rows]
        return "\n".join(map(_line, (chosen, ("---",) * len(chosen), *rows)))

    def plain(self) -> str:
        """For a terminal: the title, aligned columns, the notes."""
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in (self.columns, *self.rows))
        return "\n".join((self.title, *lines, *self.notes))


def commit_name(commit: dict[str, Any]) -> str:
    """A result's commit in words."""
    sha = "no commit" if commit["sha"] is None else str(commit["sha"])[:12]
    return f"{sha} with uncommitted changes" if commit["dirty"] else sha


def _line(cells: Row) -> str:
    return f"| {' | '.join(cells)} |"
