"""What the documentation site adds to Sphinx, and figures in its prose. The site itself is built by ``make docs``."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(DOCS))
    yield lambda name: importlib.import_module(f"extensions.{name}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "extensions"]:
        del sys.modules[name]


def read(outside: ModuleType, docname: str, text: str) -> str:
    source = [text]
    outside._read(SimpleNamespace(srcdir=str(DOCS)), docname, source)
    return source[0]


def test_a_notebook_becomes_markdown_with_its_printed_text(extension) -> None:
    cells = [
        nbformat.v4.new_markdown_cell("# Title"),
        nbformat.v4.new_code_cell("print(1)", outputs=[nbformat.v4.new_output("stream", name="stdout", text="1\n")]),
        nbformat.v4.new_code_cell("x = 2"),
    ]
    made = extension("notebooks").markdown(nbformat.writes(nbformat.v4.new_notebook(cells=cells)))
    assert made == "# Title\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n```python\nx = 2\n```\n"


def test_documents_of_the_root_are_pages_and_links_follow_them(extension) -> None:
    outside = extension("outside")
    for name, page in outside.PAGES.items():
        assert (ROOT / name).is_file()
        assert read(outside, page, "a stub").startswith((ROOT / name).read_text(encoding="utf-8")[:40])
    assert "](design.md)" in read(outside, "contributing", "")
    text = (
        "[a](../DESIGN.md#shards) [b](streaming.md) [c](../examples/billion.toml) [d](https://a.b/DESIGN.md) [e](#here)"
    )
    assert read(outside, "train", text) == text.replace("../DESIGN.md#shards", "design.md#shards")
    assert read(outside, "api/longnet", "[a](../../CHANGELOG.md)") == "[a](../changelog.md)"


def test_errors_on_one_line_become_two_and_letters_no_lists(extension) -> None:
    lines = ["Args:", "    head_dim: D.", "Raises:", "    TypeError: a flag. ValueError: another value."]
    extension("docstrings")._prepare(None, "function", "f", None, None, lines)
    assert lines == ["Args:", "    head_dim: D", "Raises:", "    TypeError: a flag.", "    ValueError: another value."]


def test_every_formula_can_be_drawn(extension) -> None:
    draw = extension("mathml").tex2mathml
    found = [
        formula
        for page in DOCS.rglob("*.md")
        for formula in re.findall(
            r"\$\$?([^$`\n]+)\$\$?", re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        )
    ]
    assert len(found) > 30
    for formula in found:
        assert draw(formula).startswith("<math")


def test_the_gradients_that_a_page_quotes_are_those_measured() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "gpu-2026-11-25.json").read_text(encoding="utf-8"))
    errors = next(peer["errors"] for peer in result["peers"] if peer["name"] == "torchscale")
    page = (DOCS / "differences.md").read_text(encoding="utf-8")
    assert (
        f"torchscale's were {errors['grad_query']:.0%} (q) and {errors['grad_key']:.0%} (k)".replace("%", " %") in page
    )
    assert "`benchmarks/results/gpu-2026-11-25.json`" in page
