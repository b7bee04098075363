"""The notebooks run as they are committed, and hold nothing of the machine that ran them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_notebooks", ROOT / "scripts" / "run_notebooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_what_it_shows(
    path: Path, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shown = nbformat.read(path, as_version=4)
    found = script.tidy(script.run(path, tmp_path))
    printed = [[cell.get("outputs", []) for cell in notebook.cells] for notebook in (found, shown)]
    assert printed[0] == printed[1], "run: python scripts/run_notebooks.py"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_tidy(path: Path, script: ModuleType) -> None:
    shown = nbformat.read(path, as_version=4)
    assert nbformat.writes(script.tidy(nbformat.read(path, as_version=4))) == nbformat.writes(shown)
    assert path.stat().st_size < 40_000


def test_a_cell_that_raises_is_no_success(script: ModuleType, tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2")])
    nbformat.write(notebook, tmp_path / "wrong.ipynb")
    with pytest.raises(Exception, match="AssertionError"):
        script.run(tmp_path / "wrong.ipynb", tmp_path)


def test_both_are_seen() -> None:
    assert len(NOTEBOOKS) == 2
