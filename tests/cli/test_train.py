"""``longnet train`` as a user runs it: killed, resumed, refused."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longnet import LongNetConfig
from longnet.training.metrics import read_metrics
from longnet.training.settings import OPTIMIZERS
from longnet.training.trainer import Trainer

Longnet = Callable[..., "subprocess.CompletedProcess[str]"]
StopRun = Callable[..., "tuple[int, str]"]
STEPS = 200


def _losses(out: Path) -> list[tuple[Any, ...]]:
    return [(line["kind"], line["step"], line["loss"]) for line in read_metrics(out / "metrics.jsonl")]


@pytest.fixture
def stop_run(start_longnet: Callable[..., subprocess.Popen[str]]) -> StopRun:
    """Start a run, wait until it has written a number of lines in all, send it a signal; exit code and output."""

    def stop(arguments: list[object], out: Path, after: int, number: signal.Signals) -> tuple[int, str]:
        process = start_longnet("train", *arguments, "--out", out)
        metrics, deadline = out / "metrics.jsonl", time.monotonic() + 90
        try:
            while not metrics.exists() or metrics.read_bytes().count(b"\n") < after:
                assert process.poll() is None, "the run ended before it was to be stopped"
                assert time.monotonic() < deadline
                time.sleep(0.005)
            process.send_signal(number)
            text, _ = process.communicate(timeout=60)
        finally:
            process.kill()
        return process.returncode, text

    return stop


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_killed_twice_and_resumed_it_has_the_losses_of_a_run_that_was_not(
    tmp_path: Path, longnet: Longnet, stop_run: StopRun, train_arguments: list[object], optimizer: str
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = [*train_arguments, "--optimizer", optimizer, "--steps", STEPS]
    result = longnet("train", *arguments, "--out", whole)
    assert result.returncode == 0, result.stderr
    assert ("Muon trains the blocks' matrices, peak learning rate 0.003" in result.stdout) == (optimizer == "muon")
    code, _ = stop_run(arguments, parts, 30, signal.SIGKILL)
    assert code == -signal.SIGKILL
    code, _ = stop_run([*arguments, "--resume"], parts, 80, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert len(_losses(parts)) < STEPS
    result = longnet("train", "--out", parts, "--resume")
    assert result.returncode == 0, result.stderr
    assert "Resuming after step" in result.stdout
    assert _losses(parts) == _losses(whole)
    assert [step for kind, step, _ in _losses(parts) if kind == "train"] == list(range(1, STEPS + 1))
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_asked_to_stop_it_saves_and_says_how_to_go_on(
    tmp_path: Path, stop_run: StopRun, train_arguments: list[object]
) -> None:
    out = tmp_path / "run"
    code, text = stop_run([*train_arguments, "--steps", STEPS], out, 10, signal.SIGTERM)
    assert code == 130
    done = _losses(out)[-1][1]
    assert f"Stopped and saved after step {done}. To continue: longnet train --out {out} --resume" in text


def test_when_its_output_is_closed_it_saves_and_says_how_to_go_on(
    tmp_path: Path, start_longnet: Callable[..., subprocess.Popen[str]], longnet: Longnet, train_arguments: list[object]
) -> None:
    """As in ``longnet train | head``."""
    out = tmp_path / "run"
    with start_longnet("train", *train_arguments, "--steps", 100_000, "--out", out) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 130, said
    found = re.search(rf"standard output was closed. Stopped and saved after step (\d+). .*--out {out} --resume", said)
    assert found is not None, said
    again = longnet("train", "--out", out, "--resume", "--steps", int(found[1]) + 3)
    assert again.returncode == 0 and f"Resuming after step {found[1]}" in again.stdout, again.stderr


def test_it_says_what_it_is_doing_and_writes_the_run_folder(finished_run: Path) -> None:
    text = (finished_run.parent / "output.txt").read_text()
    for part in (
        *(
            "Reading the file",
            "training bytes",
            "Memory of a step: about",
            "Time of a step: about",
            "parameters, 1 layers",
            "segments (16, 32, 64)",
            "Training 100%",
        ),
        *("tokens/s", "bits/byte", "left", "Scoring", "lzma", "Generating a sample", "Report: ", "Held out: "),
    ):
        assert part in text, part
    names = {path.relative_to(finished_run).as_posix() for path in finished_run.rglob("*") if path.is_file()}
    assert names == {
        *("run.json", "config.json", "model.safetensors", "metrics.jsonl", "checkpoint/state.safetensors"),
        *(
            "data/prepared.json",
            *(f"data/{part}.{what}" for part in ("train", "held_out") for what in ("tokens", "documents")),
        ),
        *("evaluation.json", "report.html", "loss.png", "positions.png", "pattern.png"),
    }
    assert json.loads((finished_run / "config.json").read_text())["layers"] == 1
    # So that it can be resumed from any working directory.
    assert Path(json.loads((finished_run / "run.json").read_text())["settings"]["data"]).is_absolute()


def test_layers_of_several_types_are_trained_and_resumed(
    tmp_path: Path, longnet: Longnet, train_arguments: list[object]
) -> None:
    out = tmp_path / "run"
    layers = ("--layer-types", "strided_attention", "--window", 9, "--stride", 2, "--stride-block", 3, "--shift-keys")
    layers = (*layers, "--no-far-positions")
    result = longnet("train", *train_arguments, *layers, "--out", out, "--steps", 2)
    assert result.returncode == 0, result.stderr
    assert "1 strided_attention; window 9, stride 2 by 3" in result.stdout
    config = json.loads((out / "config.json").read_text())
    written = {
        "layer_types": ["strided_attention"],
        "sliding_window": 9,
        "stride": 2,
        "stride_block": 3,
        "shift_keys": True,
        "far_positions": False,
    }
    assert config.items() >= written.items()
    # The same settings or none continue it, others are refused by name.
    for given in ((), layers):
        result = longnet("train", "--out", out, "--resume", *given)
        assert result.returncode == 0, result.stderr
    result = longnet("train", "--out", out, "--resume", "--window", 10)
    assert result.returncode == 2 and "model sliding_window was 9, now 10" in result.stderr
    result = longnet("generate", out, "--prompt", "abc", "--tokens", 3)
    assert result.returncode == 0, result.stderr
    result = longnet("train", *train_arguments, "--window", 9, "--out", tmp_path / "other", "--steps", 1)
    assert result.returncode == 2 and "--window given for a model" in result.stderr
    assert "expected --stack or --layer-types as well" in result.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("given", "far"),
    [((), "full_attention"), (("--stack", "light"), "strided_attention"), (("--stack", "longnet"), None)],
)
def test_a_run_that_names_no_model_or_a_stack(
    tmp_path: Path, longnet: Longnet, given: tuple[str, ...], far: str | None
) -> None:
    out, text = tmp_path / "run", tmp_path / "text"
    text.write_bytes(random.Random(0).randbytes(4096))
    result = longnet("train", "--data", text, "--context", 64, "--steps", 1, *given, "--window", 32, "--out", out)
    if far is None:
        assert result.returncode == 2 and "--window given for a model" in result.stderr
        return
    assert result.returncode == 0, result.stderr
    config = json.loads((out / "config.json").read_text())
    assert config["layer_types"] == ["sliding_attention", far, "sliding_attention"]
    assert config["shift_keys"] and not config["far_positions"] and config["sliding_window"] == 32
    # The same command goes on, another stack is another model.
    result = longnet("train", "--out", out, "--resume", "--steps", 1, *given, "--window", 32)
    assert result.returncode == 0, result.stderr
    other = "light" if far == "full_attention" else "balanced"
    result = longnet("train", "--out", out, "--resume", "--stack", other)
    assert result.returncode == 2 and "model layer_types was" in result.stderr
    # A run of it begins with another stack's weights.
    begun = ("train", "--data", text, "--context", 64, "--steps", 1, "--init-from", out)
    result = longnet(*begun, "--stack", other, "--out", tmp_path / "other")
    assert result.returncode == 0 and "layer_types was" in result.stdout, result.stderr
    result = longnet(*begun, "--layer-types", "sliding_attention", "--out", tmp_path / "windows")
    assert result.returncode == 0 and "shift_keys was True, now False" in result.stdout, result.stderr
    paper = LongNetConfig.preset("tiny", "longnet").segment_lengths
    for options in (("--stack", "longnet"), ("--layer-types", "dilated_attention")):
        result = longnet(*begun, *options, "--out", tmp_path / options[1])
        assert result.returncode == 0 and f"segments {paper}" in result.stdout, result.stderr
    (tmp_path / "bare.json").write_text('{"segment_lengths": [], "dilation_rates": []}')
    bare = ("--config", tmp_path / "bare.json", "--layer-types", "dilated_attention")
    for options, words in (
        (bare, "--layer-types with dilated layers, and no segments: expected --config"),
        (("--stack", other, "--layer-types", "full_attention"), f"--stack {other} with --layer-types: expected one of"),
        (("--stack", "dense"), "stack='dense' is not a stack"),
    ):
        result = longnet(*begun, *options, "--out", tmp_path / "refused")
        assert result.returncode == 2 and words in result.stderr


def test_a_finished_run_resumed_makes_its_report_again(finished_run: Path, longnet: Longnet) -> None:
    (finished_run / "report.html").unlink()
    result = longnet("train", "--out", finished_run, "--resume")
    assert result.returncode == 0, result.stderr
    assert (finished_run / "report.html").stat().st_size > 10_000
    assert len(_losses(finished_run)) == 21


def test_of_two_starts_on_one_folder_one_wins(
    tmp_path: Path, start_longnet: Callable[..., subprocess.Popen[str]], train_arguments: list[object]
) -> None:
    out = tmp_path / "run"
    both = [start_longnet("train", *train_arguments, "--out", out, "--steps", 3) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], said
    error = said[codes.index(2)][1]
    assert f"out={str(out)!r} is in use by another process" in error or "already holds a run" in error
    assert len(read_metrics(out / "metrics.jsonl")) == 4 and (out / "report.html").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_reading_data_says_how_far_it_is_and_stops_at_once(
    tmp_path: Path, start_longnet: Callable[..., subprocess.Popen[str]], number: signal.Signals
) -> None:
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 40)
    out = tmp_path / "run"
    process = start_longnet("train", "--data", tmp_path / "sparse", "--preset", "nano", "--out", out)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"Reading the file {tmp_path / 'sparse'}\n"
        assert re.fullmatch(r"Prepared [\d,]+ of 1,099,511,627,776 bytes\n", process.stdout.readline())
        process.send_signal(number)
        assert process.wait(timeout=10) == 130
    finally:
        process.kill()
        process.communicate()
    # The same command goes on with it.
    assert sorted(path.name for path in out.iterdir()) == ["data", "starting.json"]
    assert (out / "data" / "unfinished.json").exists()
    shutil.rmtree(out)


def test_a_folder_that_changes_while_training_changes_nothing(
    tmp_path: Path, call: Longnet, train_arguments: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").mkdir()
    for number in range(4):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} is a number. " * 40)
    save = Trainer.save

    def change_data_and_save(trainer: Trainer) -> None:
        (tmp_path / "text" / "0.txt").write_text("changed")
        save(trainer)

    monkeypatch.setattr(Trainer, "save", change_data_and_save)
    arguments = ["--data", tmp_path / "text", *train_arguments[2:], "--out", tmp_path / "run", "--steps", 1]
    result = call("train", *arguments)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "report.html").exists()
    assert call("train", "--out", tmp_path / "run", "--resume").returncode == 0
    result = call("train", "--out", tmp_path / "run", "--resume", "--data", tmp_path)
    assert result.returncode == 2 and "data was " in result.stderr


def _toml(folder: Path) -> Path:
    file = folder / "model.toml"
    file.write_text('preset = "nano"\nlayers = 1\nnorm = "rms"\n')
    return file


def test_a_toml_config(tmp_path: Path, longnet: Longnet, train_arguments: list[object]) -> None:
    out = tmp_path / "run"
    arguments = [argument if not str(argument).endswith(".json") else _toml(tmp_path) for argument in train_arguments]
    assert longnet("train", *arguments, "--out", out, "--steps", 1).returncode == 0
    assert json.loads((out / "config.json").read_text())["norm"] == "rms"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "nano", "--config", "x.json"], "--preset and --config were both given"),
        (["--preset", "huge"], "'huge' is not a preset"),
        (["--stack", "dense"], "'dense' is not a stack: expected one of ('balanced', 'light', 'longnet')"),
        (["--stack", "light", "--config", "x.json"], "--stack and --config were both given"),
        (["--stack", "light", "--layer-types", "full_attention"], "with stack='light': expected one of the two"),
        (["--stride", "8"], "--stride with layers of ('sliding_attention', 'full_attention'): expected one of"),
        (
            ["--layer-types", "full_attention", "--window", "8"],
            "--window with layers of ('full_attention',): expected one of",
        ),
        (["--config", "gone.json"], "'gone.json': No such file or directory"),
        (["--data", "gone.txt"], "gone.txt' is not there: expected a file or a folder of text"),
        (["--lr", "0"], "lr=0.0: expected above 0"),
        (["--optimizer", "sgd"], "optimizer='sgd' is unknown: expected one of"),
        (["--matrix-lr", "0.01"], "matrix_lr=0.01 with optimizer='adamw': expected optimizer='muon'"),
        (["--schedule", "step"], "schedule='step' is unknown: expected one of"),
        (["--dtype", "float16", "--device", "cpu"], "dtype='float16' on device='cpu'"),
        (["--resume"], "is not a folder: expected the --out folder of longnet train"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, call: Longnet, arguments: list[str], message: str
) -> None:
    result = call("train", "--out", tmp_path / "run", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("longnet: error: ")
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten_nor_resumed_as_another(finished_run: Path, call: Longnet) -> None:
    result = call("train", "--out", finished_run, "--steps", 5)
    assert result.returncode == 2
    assert "already holds a run: expected another folder, or --resume" in result.stderr
    result = call("train", "--out", finished_run, "--resume", "--seed", 5, "--batch", 1, "--optimizer", "muon")
    assert result.returncode == 2
    assert "batch was 2, now 1; optimizer was 'adamw', now 'muon'; seed was 0, now 5" in result.stderr


def test_a_truncated_checkpoint_is_one_line_too(
    tmp_path: Path, call: Longnet, stop_run: StopRun, train_arguments: list[object]
) -> None:
    out = tmp_path / "run"
    stop_run([*train_arguments, "--steps", STEPS], out, 10, signal.SIGTERM)
    state = out / "checkpoint" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:200])
    result = call("train", "--out", out, "--resume")
    assert result.returncode == 2
    assert f"{state} is truncated or not a safetensors file" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_damaged_line_of_the_metrics_is_one_line_too(tmp_path: Path, call: Longnet, finished_run: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished_run, out)
    metrics = out / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"bits_per_byte"', '"bits_per_bytf"', 1))
    result = call("train", "--out", out, "--resume")
    assert result.returncode == 2
    assert f"longnet: error: {metrics} is damaged: line 1 (train) has no 'bits_per_byte'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_diverged_run_is_one_line_and_exit_code_1(
    tmp_path: Path, call: Longnet, train_arguments: list[object]
) -> None:
    result = call("train", *train_arguments, "--out", tmp_path / "run", "--steps", 50, "--lr", "1e30", "--clip", 0)
    assert result.returncode == 1
    assert "still holds step" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_bfloat16_weights_choose_the_dtype_and_are_generated_from(
    tmp_path: Path, longnet: Longnet, train_arguments: list[object]
) -> None:
    arguments = [one for one in train_arguments if one not in ("--dtype", "float32")]
    out = tmp_path / "run"
    result = longnet("train", *arguments, "--weights", "bfloat16", "--out", out, "--steps", 2)
    assert result.returncode == 0, result.stderr
    assert " in bfloat16 and bfloat16 weights with " in result.stdout
    result = longnet("generate", out, "--prompt", "abc", "--tokens", 3)
    assert result.returncode == 0, result.stderr
    for dtype in ("float32", "bfloat16"):
        result = longnet("stream", out, "--data", out / "run.json", "--dtype", dtype, "--out", tmp_path / dtype)
        assert result.returncode == 0, result.stderr
    result = longnet("train", *arguments, "--weights", "bfloat16", "--dtype", "float32", "--out", tmp_path / "other")
    assert result.returncode == 2 and "weights='bfloat16' with dtype='float32'" in result.stderr
    assert not (tmp_path / "other").exists()


def test_a_run_begins_with_the_weights_of_another(
    tmp_path: Path, longnet: Longnet, finished_run: Path, train_arguments: list[object]
) -> None:
    data = train_arguments[: train_arguments.index("--config")]
    arguments = [*data, "--init-from", finished_run, "--device", "cpu", "--context", 128, "--steps", 3]
    first = json.loads((finished_run / "config.json").read_text())
    result = longnet("train", *arguments, "--out", tmp_path / "same")
    assert result.returncode == 0, result.stderr
    assert f"Starting from the weights of {finished_run}" in result.stdout and " was " not in result.stdout
    assert json.loads((tmp_path / "same" / "config.json").read_text()) == first
    assert _losses(tmp_path / "same")[0][2] < 0.9 * _losses(finished_run)[0][2]
    # Options change the model that is there; one config file gives two of its fields.
    (tmp_path / "changes.json").write_text(json.dumps({"dropout": 0.0, "segment_lengths": [16, 32, 128]}))
    out = tmp_path / "other"
    changes = ("--config", tmp_path / "changes.json", "--layer-types", "sliding_attention", "--window", 9)
    result = longnet("train", *arguments, *changes, "--out", out)
    assert result.returncode == 0, result.stderr
    for line in ("segment_lengths was (16, 32, 64), now (16, 32, 128)", "dropout was 0.1, now 0.0"):
        assert line in result.stdout.splitlines()
    assert "sliding_window was 512, now 9" in result.stdout
    config = json.loads((out / "config.json").read_text())
    assert config.items() >= {**first, "dropout": 0.0, "segment_lengths": [16, 32, 128], "sliding_window": 9}.items()
    # The command with --resume added is that of the run; with another config or other weights it is not.
    result = longnet("train", *arguments, *changes, "--out", out, "--resume")
    assert result.returncode == 0, result.stderr
    (tmp_path / "changes.json").write_text('{"dropout": 0.2}')
    result = longnet("train", *arguments, *changes, "--out", out, "--resume")
    assert result.returncode == 2 and "model dropout was 0.0, now 0.2" in result.stderr
    result = longnet("train", "--out", out, "--resume", "--init-from", tmp_path / "same")
    assert result.returncode == 2 and "those of the start" in result.stderr


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a tokenizer, its embedding padded by four rows."""
    transformers = pytest.importorskip("transformers")
    from longnet.training.data import train_tokenizer

    folder = tmp_path_factory.mktemp("models") / "llama"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=274, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, **sizes
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    train_tokenizer([b"the square of a number is a number"] * 9, 270).save(folder)
    return folder


def test_a_transformer_is_trained_from_end_to_end(
    tmp_path: Path, longnet: Longnet, llama: Path, train_arguments: list[object]
) -> None:
    import longnet.hf as hf

    arguments = [*train_arguments[: train_arguments.index("--config")], "--device", "cpu", "--steps", 3]
    out = tmp_path / "run"
    result = longnet("train", *arguments, "--context", 64, "--init-from", llama, "--out", out)
    assert result.returncode == 0, result.stderr
    for line in (f"Tokenizer: {llama}", "segment_lengths was (), now (32, 64)", "tokenizer_size was None, now 270"):
        assert line in result.stdout.splitlines()
    assert (out / "report.html").is_file() and type(hf.from_run(out)).__name__ == "LlamaForCausalLM"
    assert longnet("train", "--out", out, "--steps", 4, "--resume").returncode == 2, "another length of a schedule"
    assert longnet("train", "--out", out, "--resume").returncode == 0
    result = longnet("generate", out, "--prompt", "the square", "--tokens", 5, "--device", "cpu")
    assert result.returncode == 0 and result.stdout.startswith("the square")
    result = longnet("inspect", "--model", out, "--length", 64, "--out", tmp_path / "pattern.png")
    assert result.returncode == 0 and "32/1" in result.stdout
    (tmp_path / "longer.json").write_text(json.dumps({"segment_lengths": [32, 256], "dilation_rates": [1, 8]}))
    more = ("--config", tmp_path / "longer.json", "--init-from", out, "--out", tmp_path / "longer")
    result = longnet("train", *arguments, "--context", 256, *more)
    assert result.returncode == 0, result.stderr
    assert "max_position_embeddings was 64, now 256" in result.stdout


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--preset", "nano"), "--preset nano with a model of transformers ('llama')"),
        (("--stack", "light"), "--stack light with a model of transformers ('llama')"),
        (("--shift-keys",), "--shift-keys with a model of transformers ('llama')"),
        (("--cp", 2), "cp=2 with a model of transformers ('llama')"),
        (("--compile",), "compile=True with a model of transformers ('llama')"),
        (("--tokenizer", "bytes"), "is another one: expected the same"),
        (("--layer-types", "strided_attention"), "sliding_window=None: expected a number of tokens"),
    ],
)
def test_options_that_a_transformer_does_not_take_are_refused(
    tmp_path: Path, call: Longnet, llama: Path, more: tuple[object, ...], message: str
) -> None:
    out = tmp_path / "run"
    result = call("train", "--data", llama / "config.json", "--init-from", llama, "--context", 64, "--out", out, *more)
    assert result.returncode == 2 and message in result.stderr and not out.exists()


@pytest.mark.parametrize(
    ("place", "more", "message"),
    [
        ("gone", (), "gone' is not there: expected a run folder of longnet train, a folder of save_model"),
        ("run", ("--preset", "nano"), "does not fit the model: layers was 1, now 2; of its parameters 20 differ: "),
        (
            "run",
            ("--no-far-positions",),
            "--no-far-positions given for a model whose layers are all 'dilated_attention'",
        ),
        ("run", ("--window", 9), "--window given for a model whose layers are all 'dilated_attention'"),
    ],
)
def test_weights_that_a_run_cannot_begin_with(
    tmp_path: Path, call: Longnet, finished_run: Path, place: str, more: tuple[object, ...], message: str
) -> None:
    init_from, out = finished_run.parent / place, tmp_path / "out"
    result = call(
        "train", "--data", finished_run / "run.json", "--context", 64, "--init-from", init_from, "--out", out, *more
    )
    assert result.returncode == 2
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not out.exists()


def test_the_same_command_resumes_a_preset_whose_vocabulary_is_the_tokenizers(tmp_path: Path) -> None:
    from longnet.cli.train import _make_settings, _Named
    from longnet.models import LongNetConfig
    from longnet.training.folder import RunFolder
    from longnet.training.settings import TrainSettings

    settings = TrainSettings(out=str(tmp_path), model=LongNetConfig.preset("nano", vocab_size=300), steps=3)
    RunFolder(tmp_path).write_starting(settings.to_dict())
    asked = {"out": str(tmp_path), "steps": 3}
    assert _make_settings(asked, _Named("nano", None, None), {}, resume=True).model == settings.model
