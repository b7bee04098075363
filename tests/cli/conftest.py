"""A text, a model config and the command line in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).parents[2] / "src"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "COLUMNS": "120", "NO_COLOR": "1"}
Longnet = Callable[..., subprocess.CompletedProcess[str]]
StartLongnet = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="session")
def start_longnet(forked: list[str]) -> StartLongnet:
    """Start ``longnet`` with the arguments given."""

    def start(*arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*forked, "-m", "longnet", *map(str, arguments)],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope="session")
def longnet(start_longnet: StartLongnet) -> Longnet:
    """Run ``longnet`` with the arguments given and return what it wrote."""

    def run(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        process = start_longnet(*arguments)
        try:
            out, err = process.communicate(stdin, timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Longnet:
    """The same in this process, for what ends at once."""
    from longnet.cli.main import run as run_main

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["longnet", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "120")
        with pytest.raises(SystemExit) as exit_info:
            run_main()
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, int(exit_info.value.code or 0), out, err)

    return run


@pytest.fixture(scope="session")
def train_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Arguments of a small run on a small text, all but --out and --steps."""
    root = tmp_path_factory.mktemp("inputs")
    (root / "text.txt").write_text("".join(f"line {n}: the square of {n} is {n * n}\n" for n in range(400)))
    model = {"preset": "nano", "layers": 1, "dropout": 0.1}
    (root / "model.json").write_text(json.dumps(model))
    return [
        *("--data", root / "text.txt", "--config", root / "model.json", "--context", 64, "--batch", 2),
        *("--warmup", 5, "--eval-every", 50, "--save-every", 7, "--threads", 1, "--device", "cpu"),
    ]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, longnet: Longnet, train_arguments: list[object]) -> Path:
    """The run folder of a finished run of 20 steps; its output in ``output.txt`` beside it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    result = longnet("train", *train_arguments, "--out", out, "--steps", 20)
    assert result.returncode == 0, result.stderr
    (out.parent / "output.txt").write_text(result.stdout)
    return out


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A slide encoder's random checkpoint, as small as its architecture is made here."""
    from longnet.gigapath import SlideEncoder

    monkeypatch.setattr("longnet.gigapath.encoder.ARCHITECTURES", {"gigapath_slide_enc12l768d": (2, 32)})
    torch.manual_seed(0)
    torch.save({"model": SlideEncoder(32, 2).upstream_state_dict()}, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"
