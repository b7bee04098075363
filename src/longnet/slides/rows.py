"""Tables of slides: CSV files whose every row has a cell for each column."""

from __future__ import annotations

import csv
from pathlib import Path

from longnet.slides.folders import counted


def read_rows(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The header, and of each row its line and its cells by column; blanks around names and cells are taken off.

    Raises:
        ValueError: no CSV in UTF-8, no row, a column that is there twice, or a row of more or fewer cells than the header.
        OSError: a file that cannot be read.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if cells]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8: {error}") from None
    header = lines[0][1] if lines else []
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise ValueError(f"{path} has several columns {', '.join(map(repr, twice))}: expected each name once")
    for line, cells in lines[1:]:
        if len(cells) != len(header):
            raise ValueError(
                f"{path}, line {line} has {counted(len(cells), 'cell')}: expected {len(header)}, as the header has"
            )
    if len(lines) < 2:
        raise ValueError(f"{path} has no row: expected a header and a row for each slide")
    return header, [(line, dict(zip(header, cells, strict=True))) for line, cells in lines[1:]]
