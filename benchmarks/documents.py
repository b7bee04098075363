"""Tables of the documents, written from committed results: between ``<!-- table: NAME FILE -->`` and ``<!-- end -->``.

NAME is a table's title in lower case with dashes (``speed``, ``gigapaths-shape``); with ``/all`` behind it the notes follow.
``header`` is the line with commit, versions and device, ``summary`` says which limits are missed. FILE is a path from the
root of the checkout; a folder holds runs of ``benchmarks.learning``, and its table is ``patterns``, or ``equal-time``,
``conversions`` and ``lengths``.
"""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import report, results

_BLOCK = re.compile(
    r"^(?P<open><!-- table: (?P<name>\S+) (?P<file>\S+) -->)\n(?P<body>.*?)^(?P<close><!-- end -->)$",
    re.MULTILINE | re.DOTALL,
)
_OPENING = re.compile(r"^<!-- table: .*$", re.MULTILINE)


class BadMarker(ValueError):
    """A marker that names nothing, or has no end."""


def documents(root: Path) -> list[Path]:
    """README.md and every markdown file below docs."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def rewrite(text: str, root: Path) -> str:
    """The text with every marked block made anew.

    Raises:
        BadMarker: a block without an end, or an unknown table.
        NoResult: a file that is no result.
    """
    if len(_OPENING.findall(text)) != len(_BLOCK.findall(text)):
        raise BadMarker("a table marker has no <!-- end --> on a line of its own, or not the form NAME FILE")

    def block(match: re.Match[str]) -> str:
        made = table(match["name"], root / match["file"])
        return f"{match['open']}\n{made}\n{match['close']}"

    return _BLOCK.sub(block, text)


def table(name: str, file: Path) -> str:
    """The markdown of one table of a result.

    Raises:
        BadMarker: there is no table of this name.
        NoResult: a file that is no result.
    """
    if file.is_dir():
        # Here: they need numpy and matplotlib.
        from benchmarks.learning import equal_time_report
        from benchmarks.learning import report as learning

        if name == "patterns":
            return learning.comparison(learning.load(file)).markdown()
        tables = {
            "equal-time": equal_time_report.comparison,
            "conversions": equal_time_report.conversions,
            "lengths": equal_time_report.lengths,
        }
        if name not in tables:
            raise BadMarker(f"{file.name} has no table {name!r}: expected patterns, {', '.join(tables)}")
        return tables[name](equal_time_report.load(file)).markdown()
    result = results.load(file)
    title, _, rest = name.partition("/")
    if rest not in ("", "all"):
        raise BadMarker(f"{name}: expected NAME or NAME/all")
    if title == "header":
        return report.header(result)
    if title == "summary":
        return "\n".join(f"- {line}" for line in report.summary(result))
    by_name = {slug(one.title): one for one in report.tables(result)}
    if title not in by_name:
        raise BadMarker(f"{file.name} has no table {title!r}: expected header, summary or one of {', '.join(by_name)}")
    notes = "\n".join(f"- {note}" for note in by_name[title].notes) if rest else ""
    return "\n\n".join(filter(None, (by_name[title].markdown(), notes)))


def slug(title: str) -> str:
    """A title as a name: up to its first colon or comma, in lower case, with dashes."""
    start = re.split(r"[:,]", title)[0].lower().replace("'", "")
    return re.sub(r"[^a-z0-9]+", "-", start).strip("-")
