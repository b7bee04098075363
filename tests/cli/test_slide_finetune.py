"""``longnet slide-finetune`` on two classes of noise."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

Longnet = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def arguments(tmp_path: Path) -> list[object]:
    """All but --task and the size of the encoder."""
    (tmp_path / "features").mkdir()
    lines = ["slide,patient,label"]
    for number in range(12):
        save_file(
            {"features": torch.randn(5, 8), "coords": torch.zeros(5, 2)}, tmp_path / f"features/s{number}.safetensors"
        )
        lines.append(f"s{number},p{number},{'ab'[number % 2]}")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    folders = ("--features", tmp_path / "features", "--out", tmp_path / "out", "--device", "cpu")
    return ["slide-finetune", tmp_path / "table.csv", *folders, "--folds", 2, "--epochs", 1, "--no-baselines"]


def test_a_run_prints_its_metric_and_where_the_report_is(
    arguments: list[object], tmp_path: Path, call: Longnet
) -> None:
    command = (*arguments, "--task", "classification", "--dim", 32, "--depth", 1)
    result = call(*command)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[-2].startswith("encoder of random weights: auroc 0.") and lines[-1] == str(
        tmp_path / "out" / "report.html"
    )
    assert "The slide encoder has random weights, no checkpoint: 1 layer of 32 channels." in result.stdout
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["depth"] == 1
    again = call(*command)
    assert again.stdout.splitlines()[-2:] == lines[-2:] and "Continuing the run" in again.stdout
    changed = call(*command, "--lr", 1e-3)
    assert (
        changed.returncode == 2 and "lr was 0.0002, now 0.001" in changed.stderr and "Traceback" not in changed.stderr
    )


def test_refusals_are_one_line(arguments: list[object], tmp_path: Path, call: Longnet) -> None:
    result = call(*arguments, "--task", "classification")
    assert result.returncode == 2 and "expected a checkpoint, or dim and depth" in result.stderr
    result = call(*arguments, "--task", "survival", "--dim", 32, "--depth", 1)
    assert result.returncode == 2 and "table.csv has no column 'time'" in result.stderr
    assert result.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
