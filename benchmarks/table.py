"""A table of text, as markdown and on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

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
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (chosen, ("---",) * len(chosen), *rows))

    def plain(self) -> str:
        """For a terminal: the title, aligned columns, the notes."""
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in (self.columns, *self.rows))
        return "\n".join((self.title, *lines, *self.notes))


def table(
    title: str, rows: Iterable[Mapping[str, str]], notes: Iterable[str] = (), brief: Row = (), columns: Row = ()
) -> Table:
    """A table of rows that name their columns, all alike; ``columns`` are those of one without rows."""
    listed = list(rows)
    columns = tuple(listed[0]) if listed else columns
    return Table(title, columns, tuple(tuple(row.values()) for row in listed), tuple(notes), brief)
