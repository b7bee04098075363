"""``longnet choose-layers``: what it prints and writes, and that the command that it prints begins with these losses."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import make_run

from longnet.training.data import read_corpus
from longnet.training.files import write_json
from longnet.training.metrics import read_metrics

Longnet = Callable[..., "subprocess.CompletedProcess[str]"]
DENSE = {"layers": 3, "layer_types": ["full_attention"], "segment_lengths": [], "dilation_rates": [], "dropout": 0.0}
MEASURED = ("--context", 48, "--window", 6, "--texts", 4, "--dtype", "float32", "--device", "cpu")
TRAINED = ("--batch", 2, "--accumulate", 2, "--steps", 1, "--dtype", "float32", "--device", "cpu", "--threads", 1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {n}: the square of {n} is {n * n}\n" for n in range(200)))
    return path


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense LongNet with random weights."""
    return make_run(tmp_path_factory.mktemp("runs") / "dense", **DENSE)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a tokenizer, its embedding padded by four rows."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    from longnet.training.data import train_tokenizer

    folder = tmp_path_factory.mktemp("models") / "llama"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=274, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, initializer_range=0.2, **sizes
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    train_tokenizer([b"the square of a number is a number"] * 9, 270).save(folder)
    return folder


@pytest.mark.parametrize("kind", ["dense", "llama"])
def test_the_printed_command_trains_on_from_the_loss_in_the_table(
    kind: str, request: pytest.FixtureRequest, text: Path, call: Longnet, tmp_path: Path
) -> None:
    model, file = request.getfixturevalue(kind), tmp_path / "choice.json"
    result = call("choose-layers", model, "--data", text, *MEASURED, "--json", file)
    assert result.returncode == 0, result.stderr
    written = json.loads(file.read_text())
    (command,) = re.findall(r"^  (longnet train .*)$", result.stdout, flags=re.MULTILINE)
    assert command == written["command"]
    assert f"--layer-types {','.join(written['rows'][-1]['layer_types'])} --window 6 " in command
    unit = {"dense": "bits per byte", "llama": "nats per token"}[kind]
    assert written["unit"] == unit and f"loss, {unit}" in result.stdout
    assert [len(row["full_layers"]) for row in written["rows"]] == [3, 2, 1]
    # The first row is the model as it is.
    for number, row in list(enumerate(written["rows"]))[1:]:
        words = shlex.split(command)[1:]
        # Other rows differ in --layer-types alone.
        words[words.index("--layer-types") + 1] = ",".join(row["layer_types"])
        words[words.index("RUN")] = str(tmp_path / str(number))
        trained = call(*words, *TRAINED, "--eval-every", 0)
        assert trained.returncode == 0, trained.stderr
        first = next(line for line in read_metrics(tmp_path / str(number) / "metrics.jsonl") if line["kind"] == "train")
        assert row["loss"] == pytest.approx(first["loss"] / (math.log(2) if kind == "dense" else 1), abs=2e-6)
        assert f"{row['loss']:.4f}" in result.stdout and f"{row['pair_share']:.2%}" in result.stdout
        assert f"{row['loss']:.4f} {unit}" in result.stderr, "no line after the step"
    assert len({round(row["loss"], 5) for row in written["rows"]}) == 3


def test_the_row_of_full_is_that_of_the_command(dense: Path, text: Path, call: Longnet) -> None:
    result = call("choose-layers", dense, "--data", text, *MEASURED, "--full", 2)
    types = re.search(r"--layer-types (\S+)", result.stdout)
    assert types is not None and types[1].split(",").count("full_attention") == 2
    assert "To train on with 2 full layers (layers " in result.stdout
    assert "4 of 4 passes over the text" in result.stderr and "passes" not in result.stdout


def test_the_held_out_part_is_not_read(
    dense: Path, text: Path, call: Longnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = read_corpus(text, folder=tmp_path / "prepared")
    assert corpus.held_out.size > 48
    read: list[Any] = []
    cut = "longnet.training.evaluate.cut_windows"
    from longnet.training.data import cut_windows

    monkeypatch.setattr(cut, lambda stream, *more: read.append(stream) or cut_windows(stream, *more))
    assert call("choose-layers", dense, "--data", tmp_path / "prepared", *MEASURED).returncode == 0
    assert len(read) == 4 * (1 + 3 + 2) and {stream.path.name for stream in read} == {"train.tokens"}


def test_the_context_is_that_of_the_run(dense: Path, text: Path, call: Longnet, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(dense, run)
    write_json(run / "run.json", {"settings": {"context": 40}})
    result = call("choose-layers", run, "--data", text, *MEASURED[2:], "--full", 2)
    assert result.returncode == 0 and " --context 40 " in result.stdout
    assert "Windows of 6 at a context of 40" in result.stdout


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of text under another name than text."""
    path = tmp_path_factory.mktemp("rows") / "my rows.jsonl"
    path.write_text("".join(json.dumps({"body": f"row {n} of {n * n}\n" * 9}) + "\n" for n in range(90)))
    return path


def test_the_text_and_the_recipe_are_those_of_the_run(dense: Path, rows: Path, call: Longnet, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained = (
        "train",
        "--config",
        dense / "config.json",
        "--data",
        rows,
        "--field",
        "body",
        "--context",
        40,
        "--steps",
        40,
    )
    trained += (
        "--batch",
        2,
        "--optimizer",
        "muon",
        "--lr",
        "0.002",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--out",
        run,
    )
    assert call(*trained, "--eval-every", 0).returncode == 0
    file = tmp_path / "choice.json"
    result = call("choose-layers", run, *MEASURED[2:], "--full", 2, "--json", file)
    assert result.returncode == 0, result.stderr
    command = json.loads(file.read_text())["command"]
    assert f"--context 40 --data '{rows}' --field body --steps 2 --batch 2 --optimizer muon " in command
    assert "--lr 0.0006 --schedule linear --warmup 1 --matrix-lr 0.0018 --out RUN" in command
    words = shlex.split(command)[1:-1]
    result = call(*words, tmp_path / "converted", "--device", "cpu", "--dtype", "float32", "--eval-every", 0)
    assert result.returncode == 0, result.stderr
    lines = [line for line in read_metrics(tmp_path / "converted" / "metrics.jsonl") if line["kind"] == "train"]
    assert len(lines) == 2 and lines[0]["lr"] <= 0.0006
    given = call("choose-layers", run, *MEASURED[2:], "--full", 2, "--data", rows, "--field", "row")
    assert given.returncode == 2 and "field='row'" in given.stderr
    rows.rename(tmp_path / "moved.jsonl")
    result = call("choose-layers", run, *MEASURED[2:], "--full", 2)
    (tmp_path / "moved.jsonl").rename(rows)
    assert (
        result.returncode == 2
        and f"was trained on {rows}, which is not there: expected --data as well" in result.stderr
    )


def test_json_takes_no_place_of_something_else(dense: Path, text: Path, call: Longnet, tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link.json"
    os.mkfifo(pipe)
    link.symlink_to(tmp_path / "target.json")
    for path, words in (
        (pipe, "expected a file in a folder that is there"),
        (dense / "config.json", "lies in the model's folder"),
    ):
        result = call("choose-layers", dense, "--data", text, *MEASURED, "--json", path)
        assert result.returncode == 2 and words in result.stderr and "Reading" not in result.stderr
    assert pipe.is_fifo()
    assert call("choose-layers", dense, "--data", text, *MEASURED, "--full", 2, "--json", link).returncode == 0
    assert link.is_symlink() and json.loads((tmp_path / "target.json").read_text())["window"] == 6


def test_a_transformer_with_attention_of_its_own_is_refused(text: Path, call: Longnet, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
    config = transformers.GPTNeoConfig(vocab_size=256, max_position_embeddings=64, **sizes)
    transformers.GPTNeoForCausalLM(config).save_pretrained(tmp_path / "neo")
    result = call("choose-layers", tmp_path / "neo", "--data", text, *MEASURED)
    assert result.returncode == 2 and "GPTNeoForCausalLM does not use transformers' AttentionInterface" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--context", 0), "--context=0: expected at least 1"),
        (("--window", -3), "--window=-3: expected at least 1"),
        (("--full", 0), "--full=0: expected at least 1"),
        (("--full", 3), "full=3 with 3 full layers in the model: expected from 1 to 2"),
        (("--texts", 0), "--texts=0: expected at least 1"),
        (("--batch", 0), "--batch=0: expected at least 1"),
        (("--window", 48), "window=48 with context=48: expected a window shorter"),
        (("--dtype", "int8"), "--dtype='int8': expected one of"),
        (("--device", "nothing"), "device='nothing' cannot be used"),
        (("--json", "no/folder/file.json"), "--json no/folder/file.json: expected a file in a folder that is there"),
        (("--json", ""), "'' is empty: expected a path"),
        (("--data", "other"), "--data given 2 times"),
    ],
)
def test_bad_values_are_refused_before_the_text_is_read(
    dense: Path, text: Path, call: Longnet, arguments: tuple[object, ...], words: str
) -> None:
    result = call("choose-layers", dense, "--data", text, *MEASURED, *arguments)
    assert result.returncode == 2 and words in result.stderr
    assert "Reading" not in result.stderr and result.stdout == ""


def test_models_that_it_does_not_take(
    dense: Path, llama: Path, text: Path, call: Longnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(model: Path, *arguments: object) -> str:
        result = call("choose-layers", model, "--data", text, *arguments)
        assert result.returncode == 2 and result.stdout == "" and "Reading" not in result.stderr
        return result.stderr

    assert f"MODEL='{tmp_path / 'none'}' is not there" in refused(tmp_path / "none")
    assert "is no run folder, which says its context: expected --context" in refused(dense)
    assert "all of LongNet's dilated attention" in refused(make_run(tmp_path / "dilated"), *MEASURED)
    other = make_run(tmp_path / "other", **DENSE, vocab_size=300)
    assert "has 300 tokens and holds no tokenizer.json: expected --tokenizer" in refused(other, *MEASURED)
    assert "has 300 tokens, and the tokenizer 270" in refused(other, *MEASURED, "--tokenizer", llama)
    assert f"the tokenizer of MODEL {llama} is another one" in refused(llama, *MEASURED, "--tokenizer", "bytes")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "choose-layers in 2 processes of torchrun: expected one process" in refused(dense, *MEASURED)
