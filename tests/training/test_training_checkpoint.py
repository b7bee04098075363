"""Checkpoints are whole or refused, and a failed write leaves the one before."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
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
# What version 1 wrote for these tensors.
DIGEST_1 = "c1c0cf183178209a14912b39e9f2b5cc"


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
    with pytest.raises(CheckpointError, match="is damaged: its content does not match its digest"):
        read_checkpoint(file)


def test_a_flipped_bit_anywhere_is_found(file: Path) -> None:
    content = file.read_bytes()
    for place in range(len(content)):
        broken = bytearray(content)
        broken[place] ^= 1 << place % 8
        file.write_bytes(broken)
        with pytest.raises(CheckpointError):
            read_checkpoint(file)


def test_one_content_has_one_file(file: Path, tmp_path: Path) -> None:
    for number in range(8):
        save_checkpoint(tmp_path / str(number), TENSORS, PROGRESS)
        assert (tmp_path / str(number)).read_bytes() == file.read_bytes()


def test_a_changed_step_is_found(file: Path) -> None:
    content = file.read_bytes()
    changed = content.replace(rb"\"step\": 3", rb"\"step\": 9")
    assert changed != content
    file.write_bytes(changed)
    with pytest.raises(CheckpointError, match="is damaged: its content does not match its digest"):
        read_checkpoint(file)


def test_a_file_without_its_digest_is_refused(file: Path) -> None:
    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata())
    del metadata["digest"]
    save_file(TENSORS, file, metadata=metadata)
    with pytest.raises(CheckpointError, match="does not match its digest"):
        read_checkpoint(file)


def test_other_readers_of_safetensors_read_it(file: Path) -> None:
    found = load_file(file)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["progress"]) == PROGRESS


def test_a_file_of_version_1_is_read_and_its_digest_checked(file: Path) -> None:
    metadata = {"format": "longnet-training-state-1", "progress": json.dumps(PROGRESS)}
    save_file(TENSORS, file, metadata={**metadata, "digest": DIGEST_1})
    assert read_checkpoint(file).progress == PROGRESS
    for digest in ({"digest": "0" * 32}, {}):
        save_file(TENSORS, file, metadata={**metadata, **digest})
        with pytest.raises(CheckpointError, match="does not match its digest"):
            read_checkpoint(file)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": {"dtype": "F32", "shape": [1 << 50], "data_offsets": [0, 1 << 52]}}, "a does not lie where"),
        ({"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, "a does not lie where"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "a does not lie where"),
        ({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, "F99"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "it holds .* expected"),
        ([], "not a safetensors file"),
    ],
)
def test_a_header_of_another_content_is_refused(file: Path, header: object, message: str) -> None:
    said = json.dumps(header).encode()
    file.write_bytes(len(said).to_bytes(8, "little") + said + bytes(8))
    with pytest.raises(CheckpointError, match=message):
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
