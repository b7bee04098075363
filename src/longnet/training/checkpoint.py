"""Training state as one safetensors file: weights, optimizer, random state. One rename commits all of it; no pickle.

Tensor names: ``model.<parameter or buffer>``, ``optimizer.<parameter>.<state>``, ``rng.<device>``. The metadata hold the step,
other values that a resumed run needs, and a digest of the whole file. Any reader of safetensors can read it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from longnet.compress.quantized import plain_tensors
from longnet.training.files import write_atomically
from longnet.training.ranks import spread_like

VERSION = 2
"""Version of the formats below. From version 2 on the digest covers the whole file, in version 1 the tensors alone."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
}
_ZEROS = "0" * 32
"""Stands in the file for its digest while the file is hashed: 16 bytes in hex."""


class CheckpointError(ValueError):
    """A file that is not a whole checkpoint of this run; the message names the file and the reason."""


@dataclass(frozen=True)
class StateKind:
    """The kind of state that a file holds.

    Attributes:
        name: in words, for messages.
        format: the format's name in the file, followed by a version.
        progress: names and types of the values in its progress.
        digest_since: the first version of the format with a digest.
    """

    name: str
    format: str
    progress: dict[str, type]
    digest_since: int = 1


TRAINING = StateKind(
    "training state", "longnet-training-state", {"step": int, "seconds": float, "settings": dict, "data": str}
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read; it is not loaded into a model yet.

    Attributes:
        path: the file.
        tensors: by name, on the CPU.
        progress: JSON values: those of its kind (of a training state ``step``, ``seconds``, ``settings`` and ``data``, a
            fingerprint) and what else was saved with them.
    """

    path: Path
    tensors: dict[str, Tensor]
    progress: dict[str, Any]

    def place(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the names in ``like``, on the devices of these and sharded as these are."""
        return {name: spread_like(x, self.tensors[name]) for name, x in like.items()}

    def weights(self) -> dict[str, Tensor]:
        """The model's weights, whole, on the CPU, by the names of :func:`collect_weights`."""
        return model_weights(self.tensors)


def save_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], progress: Mapping[str, Any], kind: StateKind = TRAINING
) -> None:
    """Write a checkpoint atomically: after a kill, the previous one is still whole.

    Raises:
        OSError: it could not be written; the file at ``path`` is unchanged.
    """
    on_cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    write_safetensors(path, on_cpu, kind, {"progress": json.dumps(dict(progress))})


def write_safetensors(path: Path, tensors: dict[str, Tensor], kind: StateKind, metadata: Mapping[str, str]) -> None:
    """Write tensors (on the CPU, contiguous) and metadata with their format and digest, atomically.

    Raises:
        OSError: the file could not be written; the file at ``path`` is unchanged.
    """
    about = {**metadata, "format": f"{kind.format}-{VERSION}", "digest": _ZEROS}

    def write(temporary: Path) -> None:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, metadata=about)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error
        temporary.chmod(mode)  # save_file makes it readable for its owner alone; a run folder follows the user's umask.
        with open(temporary, "r+b") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
            # safetensors writes metadata in any order; sorted, equal contents give equal files.
            entries = json.loads(header)
            entries["__metadata__"] = dict(sorted(about.items()))
            text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode().ljust(len(header))
            header = text if len(text) == len(header) else header
            file.seek(8)
            file.write(header)
            file.seek(0)
            digest = hashlib.file_digest(file, _new_digest).hexdigest()
            file.seek(8)
            file.write(header.replace(_digest_entry(_ZEROS), _digest_entry(digest)))

    write_atomically(path, write)


def read_checkpoint(path: Path, kind: StateKind = TRAINING) -> Checkpoint:
    """Read a whole checkpoint, or raise.

    Raises:
        CheckpointError: missing, truncated, damaged or of another kind.
    """
    tensors, metadata = read_safetensors(path, kind)
    try:
        progress = json.loads(metadata["progress"])
    except (KeyError, ValueError):
        raise CheckpointError(f"{path} is damaged: its progress is not JSON") from None
    return Checkpoint(path, tensors, check_progress(path, progress, kind))


def check_progress(path: Path, progress: Any, kind: StateKind = TRAINING) -> dict[str, Any]:
    """``progress`` as it is; raise CheckpointError if it lacks a value of its kind."""
    for key, expected in kind.progress.items():
        if not isinstance(progress, dict) or not isinstance(progress.get(key), expected):
            raise CheckpointError(f"{path} is damaged: its progress lacks {key!r}")
    return dict(progress)


def read_safetensors(path: Path, kind: StateKind) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors (on the CPU) and the metadata of a file that :func:`write_safetensors` wrote, checked by its digest.

    Files of version 1 are read too. The digest in a state covers its tensors alone; a model has none.

    Raises:
        CheckpointError: missing, truncated, damaged, or of another kind.
        OSError: the file cannot be read.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not there")
    # The file is not mapped: that would end the process if it became shorter, and Windows could not replace it.
    try:
        content = path.read_bytes()
        header, tensors, metadata = _parse(content)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from None
    stated, versions = metadata.get("format"), range(1, VERSION + 1)
    version = next((n for n in versions if stated == f"{kind.format}-{n}"), None)
    if version is None:
        raise CheckpointError(
            f"{path} is not a {kind.name} of longnet: its format is {stated!r}, expected '{kind.format}-{VERSION}'"
        )
    digest = metadata.get("digest")
    computed = digest_tensors(tensors) if version == 1 else _digest_file(content, header, digest or "")
    if digest != computed and (digest is not None or version >= kind.digest_since):
        raise CheckpointError(f"{path} is damaged: its content does not match its digest")
    return tensors, metadata


def _parse(content: bytes) -> tuple[bytes, dict[str, Tensor], dict[str, str]]:
    """The header, the tensors and the metadata of a safetensors file.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, RecursionError: the file is truncated or of another format.
    """
    length = int.from_bytes(content[:8], "little")
    if length > len(content) - 8:
        raise ValueError(f"it holds {len(content):,} bytes, and its header would have {length:,}")
    header, body = content[8 : 8 + length], memoryview(content)[8 + length :]
    entries = json.loads(header)
    metadata = entries.pop("__metadata__", {})
    if not all(isinstance(value, str) for value in metadata.values()):
        raise TypeError("its metadata are not text")
    tensors: dict[str, Tensor] = {}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        shape, dtype, (first, last) = entry["shape"], _DTYPES[entry["dtype"]], entry["data_offsets"]
        fits = all(type(n) is int and n >= 0 for n in shape) and last - first == math.prod(shape) * dtype.itemsize
        if first != end or not fits or last > len(body):
            raise ValueError(f"{name} does not lie where its header says")
        tensors[name] = torch.empty(shape, dtype=dtype)
        memoryview(_as_bytes(tensors[name]))[:] = body[first:last]
        end = last
    if end != len(body):
        raise ValueError(f"it holds {len(content):,} bytes, expected {8 + length + end:,}")
    return header, tensors, metadata


def _new_digest() -> Any:
    return hashlib.blake2b(digest_size=len(_ZEROS) // 2)


def _digest_file(content: bytes, header: bytes, digest: str) -> str:
    """BLAKE2 (hex) over a file with zeros in place of its ``digest``."""
    hashed = _new_digest()
    hashed.update(content[:8] + header.replace(_digest_entry(digest), _digest_entry(_ZEROS)))
    hashed.update(memoryview(content)[8 + len(header) :])
    return hashed.hexdigest()


def _digest_entry(digest: str) -> bytes:
    """The entry of the digest in the header. No other entry looks like this: quotes within texts are escaped."""
    return f'"digest":"{digest}"'.encode("utf-8", "surrogatepass")


def _as_bytes(tensor: Tensor) -> Any:
    """The content of a contiguous tensor on the CPU; through uint8, as numpy knows no bfloat16."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def collect_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's state by name, each tensor once (a tied weight has one name) so that safetensors takes it.

    Over several processes these are still the sharded tensors. A quantised weight is given as its plain tensors.
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
        CheckpointError: names, shapes or dtypes that are not the model's; the model is then unchanged.
    """
    check_tensors(collect_weights(model), weights, path)
    with torch.no_grad():
        for name, tensor in collect_weights(model).items():
            tensor.copy_(spread_like(tensor, weights[name]))


def check_tensors(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError unless both hold the same names with the same shapes and dtypes."""
    for problem, names in (
        ("lacks", expected.keys() - tensors.keys()),
        ("holds unknown", tensors.keys() - expected.keys()),
    ):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise CheckpointError(f"{path} does not fit the model: it {problem} {listed}")
    for name, tensor in expected.items():
        other = tensors[name]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            raise CheckpointError(
                f"{path} does not fit the model: {name} is {tuple(other.shape)} {other.dtype}, "
                f"expected {tuple(tensor.shape)} {tensor.dtype}"
            )


def model_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's weights among the tensors of a state, by the names of :func:`collect_weights`."""
    return {name.removeprefix("model."): x for name, x in tensors.items() if name.startswith("model.")}


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """BLAKE2 (hex) over names, shapes, types and contents of tensors on the CPU."""
    digest = _new_digest()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        digest.update(_as_bytes(tensor))
    return digest.hexdigest()
