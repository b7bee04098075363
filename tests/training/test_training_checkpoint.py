"""Checkpoints are whole or refused, and a failed write leaves the one before."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from longnet.training import CheckpointError
from longnet.training import checkpoint as module
from longnet.training.checkpoint import (
    collect_weights,
    read_checkpoint,
    restore_weights,
    save_checkpoint,
)
from longnet.training.files import write_atomically

PROGRESS = {"step": 3, "seconds": 1.5, "settings": {"seed": 0}, "data": "abc"}
TENSORS = {
    "model.weight": torch.arange(6.0).view(2, 3),
    "model.half": torch.arange(3).to(torch.bfloat16),
    "optimizer.weight.step": torch.tensor(3.0),
    "rng.cpu": torch.arange(8, dtype=torch.uint8),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "state.safetensors"
    save_checkpoint(path, TENSORS, PROGRESS)
    return path


def test_everything_comes_back_bit_for_bit(file: Path) -> None:
    found = read_checkpoint(file)
    assert found.progress == PROGRESS
    assert found.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_named(file: Path, kept: int) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:kept])
    with pytest.raises(CheckpointError, match=r"state\.safetensors is truncated or not a safetensors file"):
        read_checkpoint(file)


def test_a_damaged_tensor_is_found(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged: its tensors do not match their digest"):
        read_checkpoint(file)


def test_a_pickle_is_never_loaded(file: Path) -> None:
    torch.save(TENSORS, file)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_checkpoint(file)


def test_a_foreign_safetensors_file_is_refused(file: Path) -> None:
    save_file(TENSORS, file)
    with pytest.raises(CheckpointError, match="is not a training state of longnet: its format is None"):
        read_checkpoint(file)


def test_missing_progress_is_named(file: Path) -> None:
    save_checkpoint(file, TENSORS, {"step": 3})
    with pytest.raises(CheckpointError, match="progress lacks 'seconds'"):
        read_checkpoint(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors is not there"):
        read_checkpoint(tmp_path / "gone.safetensors")


def test_a_full_disk_surfaces_and_leaves_the_old_checkpoint(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half_written(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", half_written)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(file, TENSORS, {**PROGRESS, "step": 4})
    assert read_checkpoint(file).progress["step"] == 3
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_what_a_kill_left_behind_is_overwritten(file: Path) -> None:
    left = file.with_name(f".{file.name}.partial")
    left.write_bytes(b"half of it")
    assert read_checkpoint(file).progress["step"] == 3
    save_checkpoint(file, TENSORS, {**PROGRESS, "step": 4})
    assert read_checkpoint(file).progress["step"] == 4
    assert not left.exists()


def test_a_checkpoint_has_the_permissions_of_any_new_file(file: Path) -> None:
    other = file.with_name("other")
    other.touch()
    assert file.stat().st_mode == other.stat().st_mode


def test_an_interrupted_write_removes_its_temporary_file(tmp_path: Path) -> None:
    def interrupted(temporary: Path) -> None:
        temporary.touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", interrupted)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("bias"), "lacks bias"),
        (lambda weights: weights.update(other=torch.zeros(1)), "holds unknown other"),
        (
            lambda weights: weights.update(weight=torch.zeros(3, 2)),
            r"weight is \(3, 2\) torch.float32, expected \(2, 3\)",
        ),
        (lambda weights: weights.update(weight=torch.zeros(2, 3).half()), "weight is .* torch.float16"),
    ],
)
def test_weights_that_do_not_fit_leave_the_model_alone(change: object, message: str) -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    weights = {name: tensor.clone() for name, tensor in collect_weights(other).items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(weights)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        restore_weights(model, weights, Path("file"))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_tied_weight_is_saved_once_and_restored_for_both(tmp_path: Path) -> None:
    def tied() -> nn.ModuleDict:
        model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
        model["b"].weight = model["a"].weight
        return model

    first, second = tied(), tied()
    weights = collect_weights(first)
    assert list(weights) == ["a.weight"]
    restore_weights(second, weights, tmp_path)
    assert torch.equal(second["b"].weight, first["a"].weight)
