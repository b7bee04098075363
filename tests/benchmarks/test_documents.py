"""Tables in the documents come from committed results."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench_tools import run

from benchmarks import cli, documents, report, results
from benchmarks.report import Table

ROOT = Path(__file__).resolve().parents[2]
CPU = "benchmarks/results/cpu-2026-11-23.json"


def test_the_documents_are_up_to_date():
    done = run("tables", "--check")
    assert (done.exit_code, done.stdout) == (0, ""), "run: python -m benchmarks tables"


def test_a_block_is_made_anew_and_nothing_else_changes():
    text = f"before\n<!-- table: speed {CPU} -->\nold\n| x |\n<!-- end -->\nafter\n"
    made = documents.rewrite(text, ROOT)
    table = next(one for one in report.tables(results.load(ROOT / CPU)) if one.title == "Speed")
    assert made == f"before\n<!-- table: speed {CPU} -->\n{table.markdown()}\n<!-- end -->\nafter\n"
    assert documents.rewrite(made, ROOT) == made
    everything = documents.table("speed/all", ROOT / CPU)
    assert everything.startswith(table.markdown())
    assert table.notes[0] in everything and table.notes[0] not in made


def test_the_header_and_the_verdicts_can_be_shown_too():
    assert documents.table("header", ROOT / CPU).startswith("732b431")
    assert documents.table("summary", ROOT / CPU) == "- 23 of 23 limits reached."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"<!-- table: nothing {CPU} -->\n<!-- end -->\n",
            "has no table 'nothing': expected header, summary or one of",
        ),
        (f"<!-- table: speed/some {CPU} -->\n<!-- end -->\n", "expected NAME or NAME/all"),
        (f"<!-- table: speed {CPU} -->\n", "has no <!-- end -->"),
        (
            "<!-- table: speed benchmarks/results/learning/context-8192 -->\n<!-- end -->\n",
            "context-8192 has no table 'speed': expected patterns, equal-time, conversions, lengths",
        ),
        ("<!-- table: speed -->\n<!-- end -->\n", "not the form NAME FILE"),
    ],
)
def test_markers_that_say_nothing_are_refused(text, message):
    with pytest.raises(documents.BadMarker, match=message):
        documents.rewrite(text, ROOT)


def test_a_missing_result_is_named():
    with pytest.raises(results.NoResult, match="missing.json"):
        documents.rewrite("<!-- table: speed missing.json -->\n<!-- end -->\n", ROOT)


def test_the_command_writes_and_checks(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "result.json").write_text((ROOT / CPU).read_text())
    page = tmp_path / "docs" / "page.md"
    (tmp_path / "README.md").write_text("nothing marked\n")
    page.write_text("<!-- table: header result.json -->\n<!-- end -->\n")
    assert run("tables", "--check").exit_code == 1
    assert "732b431" not in page.read_text()
    assert run("tables").stdout == "written: docs/page.md\n"
    assert "732b431" in page.read_text()
    assert run("tables", "--check").exit_code == 0
    page.write_text("<!-- table: nothing result.json -->\n<!-- end -->\n")
    done = run("tables")
    assert done.exit_code == 2
    assert "docs/page.md" in done.stderr


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("compress-cpu-2026-11-25", "Compressed models"),
        ("gigapath-cpu-2026-11-26", "Slide encoder on a CPU"),
        ("gigapath-gpu-2026-11-26", "Slide encoder"),
        ("hf-cpu-2026-11-25", "Hugging Face"),
        ("longest-training-1-2026-11-25", "Longest training"),
        ("scaling-gpu-2026-11-30", "Scaling"),
        ("shares-8-gpu-2026-11-30", "Shares"),
    ],
)
def test_results_of_one_suite_can_be_shown_and_marked(name, title):
    file = ROOT / "benchmarks" / "results" / f"{name}.json"
    printed = run("show", file).stdout
    assert title in printed.splitlines()
    assert documents.table("header", file) == printed.splitlines()[0]
    assert documents.table(documents.slug(title), file).startswith("| ")


def test_names_of_tables():
    assert documents.slug("GigaPath's shape") == "gigapaths-shape"
    assert documents.slug("Growth: forward, microseconds per token") == "growth"


def test_a_table_is_shown_as_markdown_and_in_aligned_columns():
    table = Table("T", ("a", "b", "c"), (("1", "2", "3"),))
    assert table.markdown() == "| a | b | c |\n| --- | --- | --- |\n| 1 | 2 | 3 |"
    assert table.plain() == "T\na  b  c\n1  2  3"
