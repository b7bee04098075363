from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from longnet.cli.inspect import inspect
from longnet.geometry.cost import cost
from longnet.geometry.pattern import Pattern
from longnet.geometry.reach import receptive_field

app = typer.Typer()
app.command()(inspect)


def run(tmp_path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "pattern.png")], env={"COLUMNS": "140"})


EXAMPLE = ("--segments", "2048,4096", "--rates", "1,2", "--length", "16384", "--heads", "12")


def test_the_tables_and_the_picture(tmp_path: Path) -> None:
    result = run(tmp_path, *EXAMPLE)
    assert result.exit_code == 0, result.output
    for words in ("16,384 tokens", "keys per query", "1,536.8", "1, 4,096", "77.35 G", "18.76%", "96.8 MiB"):
        assert words in result.output
    assert "Every one of the 12 heads selects every position." in result.output
    assert "25.00%" in result.output
    assert result.output.index("Every branch starts a segment at each multiple of 4,096: no token") < 200
    assert "16,384 tokens: --segments 2048,4096,8192,16384 --rates 1,2,4,8, 23.45%" in result.output
    assert str(tmp_path / "pattern.png") in result.output.replace("\n", "")
    assert (tmp_path / "pattern.png").read_bytes().startswith(b"\x89PNG")


def test_positions_that_no_head_reaches_are_named_in_words(tmp_path: Path) -> None:
    result = run(tmp_path, "--segments", "2048", "--rates", "8", "--length", "2048", "--heads", "6")
    assert result.exit_code == 0, result.output
    assert "No head covers positions p with p mod 8 in {6, 7}: 512 of 2,048 positions (25.00%)" in result.output


def test_json_holds_the_exact_numbers(tmp_path: Path) -> None:
    result = run(
        tmp_path, *EXAMPLE, "--json", "--layers", "2", "--kv-heads", "4", "--head-dim", "32", "--bidirectional"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    expected = cost(Pattern.parse([2048, 4096], [1, 2]), 12, 16384, 32, kv_heads=4)
    assert found["cost"]["dilated"] == vars(expected.dilated)
    assert found["cost"]["dense"] == vars(expected.dense)
    assert found["keys_per_query"] == {"mean": 3072.0, "min": 2048, "max": 4096}
    assert found["coverage"]["heads"] == [1.0] * 12
    assert [layer["tokens"] for layer in found["receptive_field"]["layers"]] == [3072, 4096]
    assert (found["causal"], found["head_offsets"]) == (False, "interleaved")
    assert found["receptive_field"]["limited_to"] == 4096
    better = Pattern.parse(**found["suggestion"])
    assert receptive_field(better, 12, 16384, 2, False)[-1].tokens == 16384


def test_a_pattern_that_spans_the_sequence_gets_no_suggestion(tmp_path: Path) -> None:
    arguments = ("--segments", "2048,4096,16384", "--rates", "1,2,8", "--length", "16384")
    assert "Every branch starts a segment" not in run(tmp_path, *arguments).output
    found = json.loads(run(tmp_path, *arguments, "--json").stdout)
    assert found["suggestion"] is None and found["receptive_field"]["limited_to"] is None


def test_a_suggested_pattern_can_be_pasted_back(tmp_path: Path) -> None:
    result = run(tmp_path, "--suggest-budget", "10240", "--length", "32768", "--heads", "16")
    assert result.exit_code == 0, result.output
    assert "--segments 2048,4096,8192,16384,32768 --rates 1,2,4,8,16" in result.output


def test_a_coverage_that_cannot_be_counted_ends_nothing(tmp_path: Path) -> None:
    arguments = ("--segments", "2047,4097,32769", "--rates", "6,7,11", "--length", "1000000000", "--heads", "4")
    result = run(tmp_path, *arguments)
    assert result.exit_code == 0, result.output
    assert "Not shown: " in result.output.partition("Coverage")[2]
    assert "not_known" in json.loads(run(tmp_path, *arguments, "--json").stdout)["coverage"]


def test_a_billion_tokens_are_no_trouble(tmp_path: Path) -> None:
    result = run(tmp_path, "--segments", "4096,1000000000", "--rates", "1,8", "--length", "1000000000", "--heads", "8")
    assert result.exit_code == 0, result.output
    assert "Fewest and most keys are not shown" in result.output
    assert "Followed for the first 1,048,576 tokens only" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--segments", "2k", "--rates", "1"), "--segments '2k' holds '2k': expected whole numbers"),
        (("--segments", "8,", "--rates", "1"), "--segments '8,' holds ''"),
        (("--segments", "8,16", "--rates", "1"), "segment_lengths=(8, 16) and dilation_rates=(1,) differ"),
        (("--segments", "8"), "needs both --segments and --rates"),
        ((*EXAMPLE, "--kv-heads", "5"), "heads=12 is not divisible by kv_heads=5"),
        ((*EXAMPLE, "--layers", "0"), "layers=0"),
        ((*EXAMPLE, "--head-offsets", "odd"), "head_offsets='odd'"),
        ((*EXAMPLE, "--suggest-budget", "5"), "leave out --segments and --rates"),
        (("--suggest-budget", "5"), "give --length"),
        (("--suggest-budget", "5", "--length", "1000"), "budget=5 keys per query is too small"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    result = run(tmp_path, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    assert not (tmp_path / "pattern.png").exists()


def test_a_picture_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    result = run(tmp_path / "missing", *EXAMPLE)
    assert result.exit_code == 2
    assert "missing" in result.stderr
