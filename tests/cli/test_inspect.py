from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from longnet import LongNetConfig
from longnet.cli.inspect import inspect
from longnet.geometry.cost import cost, score_pairs
from longnet.geometry.pattern import Pattern
from longnet.geometry.reach import receptive_field
from longnet.models import LongNetCache
from longnet.training.transformer_config import TransformerConfig

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


LAYERS = ("--layer-types", "sliding_attention,strided_attention", "--window", "64", "--stride", "2", "--heads", "4")
LAYERS = (*LAYERS, "--head-dim", "8", "--length", "5000", "--shift-keys")


def test_layers_that_differ(tmp_path: Path) -> None:
    result = run(tmp_path, *LAYERS)
    assert result.exit_code == 0, result.output
    assert "No path" not in result.output and "4 layers  5,000 tokens, causal" in result.output
    for words in ("window 64, 1 of 2 of all tokens; shifted keys", "63 away", "4,999 away", "What position 4,999"):
        assert words in result.output
    for name in ("pattern.png", "pattern_strided_attention.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_json_of_layers_holds_the_exact_numbers(tmp_path: Path) -> None:
    result = run(tmp_path, *LAYERS, "--kv-heads", "2", "--layers", "2", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    window = Pattern.compose(window=64)
    strided = Pattern.compose(None, 2, window=64, dilated_queries=False, head_offsets="grouped").grouped(4, 2)
    assert [layer["pairs"] for layer in found["layers"]] == [
        score_pairs(one, 4, 5000, True) for one in (window, strided)
    ]
    assert found["pairs"] == sum(layer["pairs"] for layer in found["layers"])
    assert [layer["reach"]["tokens"] for layer in found["layers"]] == [64, 5000]
    assert (found["uncovered"], found["unreached"]) == (0, 0)
    # What caches of such layers hold, less the few numbers that say where.
    config = LongNetConfig(
        dim=32, heads=4, kv_heads=2, layers=2, layer_types=("sliding_attention", "strided_attention"), sliding_window=64,
        stride=2, segment_lengths=(), dilation_rates=(),
    )  # fmt: skip
    cache = LongNetCache(config, 1, dtype=torch.bfloat16, max_length=5000)
    assert found["cache_bytes"] == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_tokens_that_no_path_reaches_are_told(tmp_path: Path) -> None:
    options = ("--layer-types", "sliding_attention", "--window", "64", "--length", "5000", "--layers", "3")
    result = run(tmp_path, *options)
    assert "leads from 4,810 of 5,000 tokens to the last one; the nearest of them is 190 tokens away" in result.output
    found = json.loads(run(tmp_path, *options, "--json").stdout)
    assert found["unreached"] == 5000 - (3 * 63 + 1)
    sparse = (
        "--layer-types",
        "dilated_attention",
        "--segments",
        "2048",
        "--rates",
        "8",
        "--length",
        "2048",
        "--heads",
        "6",
    )
    assert "No head of any layer covers 512 of the first 2,048 positions" in run(tmp_path, *sparse).output


@pytest.mark.parametrize(
    "options",
    [
        ("--window", "16"),
        ("--segments", "none", "--rates", "4", "--all-queries", "--window", "16"),
        ("--segments", "64,none", "--rates", "2,4", "--dilation-block", "2", "--head-offsets", "grouped"),
        ("--segments", "64,128", "--rates", "1,2", "--segment-offset", "42"),
    ],
)
@pytest.mark.parametrize("direction", [(), ("--bidirectional",)])
def test_a_pattern_beyond_the_paper(tmp_path: Path, options: tuple[str, ...], direction: tuple[str, ...]) -> None:
    given = (*options, *direction, "--heads", "4", "--length", "300", "--layers", "2")
    assert run(tmp_path, *given).exit_code == 0
    found = json.loads(run(tmp_path, *given, "--json").stdout)
    assert len(found["layers"]) == 2 and found["causal"] == (not direction)
    assert (found["cache_bytes"] is None) == bool(direction)


def test_the_layers_of_a_model(tmp_path: Path) -> None:
    config = LongNetConfig.preset(
        "nano", layers=4, layer_types=("shifted_dilated_attention", "full_attention"), head_numbers=[[0, 1]] * 4
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    for path in (tmp_path, tmp_path / "config.json"):
        found = json.loads(run(tmp_path, "--model", str(path), "--length", "200", "--json").stdout)
        assert [layer["type"] for layer in found["layers"]] == list(config.layer_types or ())
        assert found["layers"][0]["segment_offset"] == 42 and found["layers"][0]["heads"] == 2
    old = LongNetConfig.preset("nano").to_dict()
    (tmp_path / "config.json").write_text(json.dumps(old))
    found = json.loads(run(tmp_path, "--model", str(tmp_path), "--json").stdout)
    assert [layer["type"] for layer in found["layers"]] == ["dilated_attention"] * 2


def test_the_types_of_a_transformer_are_repeated(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    llama = transformers.LlamaConfig(vocab_size=256, hidden_size=16, num_hidden_layers=4, num_attention_heads=2)
    types = ("sliding_attention", "full_attention")
    config = TransformerConfig(
        llama.to_dict(), layer_types=types, sliding_window=16, segment_lengths=(), dilation_rates=()
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    found = json.loads(run(tmp_path, "--model", str(tmp_path), "--length", "200", "--json").stdout)
    assert [layer["type"] for layer in found["layers"]] == [*types, *types]


@pytest.mark.parametrize(("stack", "far"), [("balanced", "full_attention"), ("light", "strided_attention")])
def test_the_layers_of_a_preset(tmp_path: Path, stack: str, far: str) -> None:
    found = json.loads(run(tmp_path, "--preset", "tiny", "--stack", stack, "--json").stdout)
    assert [layer["type"] for layer in found["layers"]] == ["sliding_attention", far, "sliding_attention"]
    assert found["length"] == 16 * 256 and found["layers"][1]["shift_keys"]
    found = json.loads(run(tmp_path, "--preset", "tiny", "--stack", stack, "--window", "32", "--json").stdout)
    assert found["length"] == 16 * 32 and found["layers"][0]["window"] == 32


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--model", "run", "--heads", "4"), "--model has layers of its own: leave out --heads"),
        (("--model", "run", "--preset", "base"), "--model has layers of its own: leave out --preset"),
        (("--preset", "base", "--heads", "4"), "--preset has layers of its own: leave out --heads"),
        (("--stack", "light", "--heads", "4"), "--stack light given without --preset: expected it as well"),
        (("--preset", "huge"), "name='huge' is not a preset"),
        (("--stride", "2", *EXAMPLE), "--stride given without --layer-types"),
        (("--layer-types", "full_attention", "--all-queries"), "--layer-types says what layers compute: leave out --all-queries"),
        (("--layer-types", "dense"), "layer_types holds 'dense': expected one of"),
        (("--window", "0"), "window=0: expected at least 1"),
        (("--window", "8", "--suggest-budget", "64"), "--suggest-budget suggests one of the paper's patterns"),
        (("--segments", "none,x", "--rates", "1,1", "--window", "8"), "--segments 'x' holds 'x'"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    result = run(tmp_path, *options)
    assert result.exit_code == 2 and said in result.output


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    result = run(tmp_path, "--model", str(tmp_path))
    assert result.exit_code == 2 and "holds no config.json: expected a run folder" in " ".join(result.output.split())
