"""The folder of a stream: its record and its state, and whether the stream can be resumed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from longnet.models import LongNetLM
from longnet.reading.settings import StreamSettings
from longnet.training.checkpoint import Checkpoint, StateKind, collect_weights, digest_tensors, read_checkpoint

STATE = StateKind(
    "stream state",
    "longnet-stream-state",
    {"position": int, "seconds": float, "settings": dict, "data": str, "model": str},
)


class StreamFolder:
    """``stream.jsonl`` is the record, ``state.safetensors`` the state that ``--resume`` reads. Making one touches no file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.record_file = self.path / "stream.jsonl"
        self.state_file = self.path / "state.safetensors"

    def require_new(self) -> None:
        """Raise ValueError if a stream is there already."""
        if self.state_file.exists() or self.record_file.exists():
            raise ValueError(
                f"out={str(self.path)!r} already holds a stream: expected another folder, or --resume to continue this one"
            )

    def read_state(self) -> Checkpoint:
        """The saved state.

        Raises:
            ValueError: no stream there.
            CheckpointError: a state that is truncated, damaged or foreign (a ValueError too).
        """
        if not self.state_file.is_file():
            raise ValueError(
                f"out={str(self.path)!r} holds no stream (no {self.state_file.name}): expected one to resume"
            )
        return read_checkpoint(self.state_file, STATE)

    def remove(self) -> None:
        """Remove the files of a stream that has not saved any progress."""
        self.state_file.unlink(missing_ok=True)
        self.record_file.unlink(missing_ok=True)


def read_settings(out: str | Path) -> StreamSettings:
    """The settings of the stream in ``out``, which a resumed stream takes where it is given none.

    Raises:
        ValueError: no stream there, or a damaged state.
    """
    return StreamSettings.from_dict(StreamFolder(out).read_state().progress["settings"])


def model_digest(model: LongNetLM) -> str:
    """BLAKE2 (hex) over the weights and the config."""
    weights = {name: x.to("cpu").contiguous() for name, x in collect_weights(model).items()}
    config = json.dumps(model.config.to_dict(), sort_keys=True)
    return hashlib.blake2b(f"{digest_tensors(weights)} {config}".encode(), digest_size=16).hexdigest()


def check_resume(state: Checkpoint, settings: StreamSettings, digest: str, device: str) -> list[str]:
    """Raise unless resuming gives the result of the stream that was started; return notes for the user.

    Args:
        state: the saved state.
        settings: those of the resumed stream.
        digest: of the model.
        device: of the resumed stream, in words.

    Raises:
        ValueError: another model or dtype, or fewer tokens than are read.
    """
    saved, position = StreamSettings.from_dict(state.progress["settings"]), state.progress["position"]
    changes = []
    if state.progress["model"] != digest:
        changes.append(
            f"the model in {settings.run!r} is not the one that has read so far (its weights or config differ)"
        )
    if saved.dtype != settings.dtype:
        changes.append(f"dtype was {saved.dtype!r}, now {settings.dtype!r}")
    if changes:
        raise ValueError(
            f"{str(state.path)!r} cannot be resumed: {'; '.join(changes)}. Expected the same, or a new --out"
        )
    if settings.tokens is not None and settings.tokens < position:
        raise ValueError(f"tokens={settings.tokens}: {position:,} bytes are read already, expected at least that many")
    was = (saved.chunk, state.progress.get("device"))
    if was == (settings.chunk, device):
        return []
    return ["Note: another chunk size or device than before, bits per byte may differ in their last digits"]
