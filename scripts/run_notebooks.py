"""Run the notebooks of docs/notebooks and keep their printed output: ``python scripts/run_notebooks.py [FILE ...]``.

What is written holds no numbers of executions, no machine's paths and no pictures, so that a change shows as what it is.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).resolve().parents[1] / "docs" / "notebooks"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def run(path: Path, folder: Path, timeout: int = 120) -> NotebookNode:
    """The notebook with its outputs, run in ``folder``.

    Raises:
        CellExecutionError: of nbclient, a cell that raised. CellTimeoutError: a cell that took more than ``timeout`` seconds.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    return notebook


def tidy(notebook: NotebookNode) -> NotebookNode:
    """What is committed: printed text stays, all else that a run leaves behind goes. In place."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", nbformat.from_dict({})
        if cell.cell_type == "code":
            text = "".join(
                output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout"
            )
            cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)] if text else []
            cell.execution_count = None
    return notebook


def main() -> None:
    for path in map(Path, sys.argv[1:] or sorted(map(str, NOTEBOOKS.glob("*.ipynb")))):
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(tidy(run(path, Path(folder))), path)
        print(path.name)


if __name__ == "__main__":
    main()
