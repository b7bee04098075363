"""Notebooks as pages: their cells as MyST Markdown, with the text outputs that they hold."""

import nbformat
from docutils import nodes
from myst_parser.sphinx_ import Parser
from sphinx.application import Sphinx


def markdown(source: str) -> str:
    """A notebook's JSON as Markdown: text as it is, code and text outputs in fences."""
    parts = []
    for cell in nbformat.reads(source, as_version=4).cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        elif cell.cell_type == "code":
            parts.append(f"```python\n{cell.source}\n```")
            shown = "".join(
                output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs
            )
            if shown:
                parts.append(f"```text\n{shown.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


class NotebookParser(Parser):
    """Of the source suffix ``.ipynb``."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        super().parse(markdown(inputstring), document)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(NotebookParser)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
