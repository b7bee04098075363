"""Training state as one safetensors file: weights, optimizer, random state. One rename commits all of it; no pickle.

Tensor names: ``model.<parameter or buffer>``, ``optimizer.<parameter>.<state>``, ``rng.<device>``. The metadata hold the step,
what else a resumed run needs, and a digest of the tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from longnet.compress.quantized import plain_tensors
from longnet.training.files import write_atomically
from longnet.training.ranks import spread_like


class CheckpointError(ValueError):
    """A file that is no whole checkpoint of this run; the message names the file and the reason."""


@dataclass(frozen=True)
class StateKind:
    """What a state file is of.

    Attributes:
        name: in words, for messages.
        format: written into the file and expected of it.
        progress: names and types of the values that its progress has.
    """

    name: str
    format: str
    progress: dict[str, type]


TRAINING = StateKind(
    "training state", "longnet-training-state-1", {"step": int, "seconds": float, "settings": dict, "data": str}
)


@dataclass(frozen=True)
class Checkpoint:
    """What was read: nothing of it is in a model yet.

    Attributes:
        path: the file.
        tensors: by name, on the CPU.
        progress: JSON values: those of its kind (of a training state ``step``, ``seconds``, ``settings`` and ``data``, a
            fingerprint) and what else was saved with them.
    """

    path: Path
    tensors: dict[str, Tensor]
    progress: dict[str, Any]


def save_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], progress: Mapping[str, Any], kind: StateKind = TRAINING
) -> None:
    """Write a checkpoint atomically: killed on the way, the one before is still there whole.

    Raises:
        OSError: it could not be written; the file at ``path`` is as it was.
    """
    held = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    metadata = {"format": kind.format, "progress": json.dumps(dict(progress)), "digest": digest_tensors(held)}
    write_safetensors(path, held, metadata)


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """``safetensors.torch.save_file``, atomically, with its input and output errors as OSError."""

    def write(temporary: Path) -> None:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error
        temporary.chmod(mode)  # save_file gives it to its owner alone; a run folder follows the user's umask.

    write_atomically(path, write)


def read_checkpoint(path: Path, kind: StateKind = TRAINING) -> Checkpoint:
    """Read a whole checkpoint, or raise.

    Raises:
        CheckpointError: missing, truncated, damaged or of another kind.
    """
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != kind.format:
        found = metadata.get("format")
        raise CheckpointError(
            f"{path} is not a {kind.name} of longnet: its format is {found!r}, expected {kind.format!r}"
        )
    if metadata.get("digest") != digest_tensors(tensors):
        raise CheckpointError(f"{path} is damaged: its tensors do not match their digest")
    try:
        progress = json.loads(metadata["progress"])
    except (KeyError, ValueError):
        raise CheckpointError(f"{path} is damaged: its progress is not JSON") from None
    for key, expected in kind.progress.items():
        if not isinstance(progress, dict) or not isinstance(progress.get(key), expected):
            raise CheckpointError(f"{path} is damaged: its progress lacks {key!r}")
    return Checkpoint(path, tensors, progress)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors (on the CPU) and the metadata of a safetensors file.

    Raises:
        CheckpointError: missing, truncated, or no safetensors file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not there")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # A copy, not a view of the mapped file: the next checkpoint replaces that file.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from None


def collect_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's state by name, each tensor once (a tied weight has one name) so that safetensors takes it.

    Over several processes these are still the spread tensors. A quantised weight is the plain tensors that it consists of.
    """
    seen: set[int] = set()
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            weights.update(plain_tensors(name, tensor.detach()))
    return weights


def restore_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copy ``weights`` into the model, all or nothing.

    Raises:
        CheckpointError: names, shapes or dtypes that are not the model's; the model is untouched then.
    """
    check_tensors(collect_weights(model), weights, path)
    with torch.no_grad():
        for name, tensor in collect_weights(model).items():
            tensor.copy_(spread_like(tensor, weights[name]))


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError unless both hold the same names with the same shapes and dtypes."""
    for problem, names in (
        ("lacks", expected.keys() - found.keys()),
        ("holds unknown", found.keys() - expected.keys()),
    ):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise CheckpointError(f"{path} does not fit the model: it {problem} {listed}")
    for name, tensor in expected.items():
        other = found[name]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            raise CheckpointError(
                f"{path} does not fit the model: {name} is {tuple(other.shape)} {other.dtype}, "
                f"expected {tuple(tensor.shape)} {tensor.dtype}"
            )


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """BLAKE2 (hex) over names, shapes, types and contents of tensors on the CPU."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        # Through uint8, as numpy knows no bfloat16; a 0-dim tensor has no bytes view.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
