"""Docstrings as this code base writes them, made ready for napoleon."""

import inspect
import re

from sphinx.application import Sphinx

# "TypeError: a flag of the wrong type. ValueError: any other bad value" on one line, as short sections have it.
_NEXT_ERROR = re.compile(r"(?<=\.) (?=[A-Z]\w+Error: )")
# "head_dim: D." would begin a list, numbered with letters.
_LETTER = re.compile(r"(?<=: )([A-Z])\.$")


def _prepare(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    made: list[str] = []
    for line in lines:
        indent = line[: len(line) - len(line.lstrip())]
        made += _NEXT_ERROR.sub("\n" + indent, _LETTER.sub(r"\1", line)).splitlines() or [""]
    lines[:] = made


def _restore(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Napoleon takes a property's first line for its type up to a colon; sentences here have colons, too."""
    if isinstance(obj, property):
        lines[:] = [*(inspect.getdoc(obj) or "").splitlines(), ""]


def setup(app: Sphinx) -> dict[str, bool]:
    # Around napoleon, which has the usual priority of 500.
    app.connect("autodoc-process-docstring", _prepare, priority=400)
    app.connect("autodoc-process-docstring", _restore, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
