"""The exact commands and options: a change here is a change for users and belongs in the changelog."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable

import pytest

import longnet
from longnet import LongNetConfig
from longnet.cli.main import app

Longnet = Callable[..., "subprocess.CompletedProcess[str]"]

OPTIONS = {
    "train": [
        *("--out", "--data", "--init-from", "--preset", "--stack", "--config", "--layer-types", "--window"),
        *("--stride", "--stride-block"),
        *("--shift-keys", "--far-positions", "--tokenizer", "--field", "--skip-bad-rows", "--pack", "--context"),
        *("--short-context", "--short-share", "--steps", "--minutes", "--batch", "--accumulate"),
        *("--optimizer", "--lr", "--matrix-lr", "--warmup", "--schedule", "--weight-decay", "--clip", "--dtype"),
        *("--weights", "--device", "--seed"),
        *("--eval-every", "--save-every", "--checkpoint", "--threads", "--cp", "--compile", "--track", "--resume"),
    ],
    "prepare": ["--data", "--out", "--tokenizer", "--field", "--skip-bad-rows"],
    "choose_layers": [
        *(
            "--data",
            "--field",
            "--skip-bad-rows",
            "--tokenizer",
            "--context",
            "--window",
            "--full",
            "--texts",
            "--batch",
            "--dtype",
            "--device",
            "--json",
        ),
    ],
    "generate": [
        "--prompt",
        "--file",
        "--tokens",
        "--temperature",
        "--top-k",
        "--top-p",
        "--stop",
        "--seed",
        "--device",
    ],
    "stream": [
        *("--data", "--out", "--tokens", "--chunk", "--dtype", "--device", "--save-every", "--resume"),
    ],
    "inspect": [
        *("--segments", "--rates", "--length", "--heads", "--head-dim", "--kv-heads", "--layers", "--bidirectional"),
        *("--head-offsets", "--window", "--all-queries", "--dilation-block", "--segment-offset", "--layer-types"),
        *(
            "--stride",
            "--stride-block",
            "--shift-keys",
            "--model",
            "--preset",
            "--stack",
            "--suggest-budget",
            "--out",
            "--json",
        ),
    ],
    "slide_encode": [
        *(
            "--checkpoint",
            "--out",
            "--arch",
            "--tile-size",
            "--unit",
            "--mpp",
            "--patients",
            "--max-wsi-size",
            "--global-pool",
            "--outputs",
            "--all-layers",
            "--heatmap",
        ),
        *("--dtype", "--device"),
    ],
    "slide_finetune": [
        *("--features", "--task", "--out", "--checkpoint", "--arch", "--dim", "--depth", "--read-out", "--freeze"),
        *("--global-pool", "--tile-size", "--unit", "--mpp", "--max-wsi-size", "--slide-column", "--patient-column"),
        *(
            "--label-columns",
            "--time-column",
            "--event-column",
            "--folds",
            "--validation",
            "--epochs",
            "--patience",
            "--warmup",
            "--lr",
        ),
        *("--layer-decay", "--weight-decay", "--dropout", "--drop-path", "--accumulate", "--intervals", "--baselines"),
        *("--baseline-lr", "--seed", "--dtype", "--device", "--parallel"),
    ],
}


def test_the_commands() -> None:
    assert [command.callback.__name__ for command in app.registered_commands if command.callback] == list(OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_options_of(name: str, call: Longnet) -> None:
    result = call(name.replace("_", "-"), "--help")
    assert result.returncode == 0
    found = re.findall(r"^  (?:-[a-z], )?(--[a-z-]+)", result.stdout, flags=re.MULTILINE)
    assert found == [*OPTIONS[name], "--help"]


def test_the_options_of_tokenizer_train(call: Longnet) -> None:
    found = re.findall(r"^  (--[a-z-]+)", call("tokenizer", "train", "--help").stdout, flags=re.MULTILINE)
    assert found == ["--data", "--vocab", "--out", "--field", "--megabytes", "--skip-bad-rows", "--help"]


def test_help_without_a_command_names_them(call: Longnet) -> None:
    result = call()
    for name in OPTIONS:
        assert re.search(rf"^\s+{name.replace('_', '-')}\s", result.stdout + result.stderr, flags=re.MULTILINE)


def test_help_fits_a_terminal_of_80_columns(call: Longnet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_: os.terminal_size((80, 24)))
    commands = call("--help").stdout.partition("Commands:\n")[2].splitlines()
    # One of them is a group.
    assert len(commands) == len(OPTIONS) + 1
    assert all(len(line) <= 80 and line.endswith(".") and not line.endswith("..") for line in commands)


def test_help_names_every_preset(call: Longnet) -> None:
    text = " ".join(call("train", "--help").stdout.split())
    presets = LongNetConfig.presets()
    assert f"Model preset: {', '.join(presets[:-1])} or {presets[-1]}." in text
    stacks = LongNetConfig.stacks()
    assert f"What the layers read: {', '.join(stacks[:-1])} or {stacks[-1]} (the paper's pattern)." in text


def test_the_version_is_printed(call: Longnet) -> None:
    assert call("--version").stdout == f"longnet {longnet.__version__}\n"


def test_an_unknown_option_is_refused(call: Longnet) -> None:
    result = call("train", "--out", "x", "--learning-rate", "1")
    assert result.returncode == 2
    assert "--learning-rate" in result.stderr
    assert "Traceback" not in result.stderr


def test_too_little_memory_is_one_line(call: Longnet, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise MemoryError

    monkeypatch.setattr("longnet.cli.main.app", fail)
    result = call("generate")
    assert result.returncode == 2
    assert result.stderr == "longnet: error: not enough memory\n"


@pytest.mark.parametrize(
    "command",
    [
        ("slide-encode", "slides", "--checkpoint", "weights.pth", "--out", ""),
        ("slide-finetune", "table.csv", "--features", "slides", "--task", "classification", "--out", ""),
        ("stream", "run", "--data", "text", "--out", ""),
    ],
)
def test_an_empty_path_is_not_the_current_folder(call: Longnet, command: tuple[str, ...]) -> None:
    result = call(*command)
    assert result.returncode == 2 and "'' is empty: expected a path" in result.stderr
