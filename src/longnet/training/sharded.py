"""Checkpoints in parts: every process writes its own in the background, and one small file commits them all.

``checkpoint/step-<n>`` holds the parts. ``checkpoint/latest.json`` names them and holds the progress. It is replaced once all
parts are on disk, and the step before is removed then: after a kill at any moment the last checkpoint is whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_saver import async_save

from longnet.training.checkpoint import Checkpoint, CheckpointError, check_progress, read_checkpoint
from longnet.training.files import read_json, write_text
from longnet.training.parts import Parts, PartWriter, first_failure

LATEST, WHOLE = "latest.json", "state.safetensors"
"""The files in a folder ``checkpoint`` that commit a checkpoint in parts, and a whole one."""
_FORMAT = "longnet-sharded-training-state-1"


@dataclass(frozen=True)
class ShardedCheckpoint(Checkpoint):
    """A checkpoint in parts: ``tensors`` are on the meta device, ``place`` and ``weights`` read the values.

    Attributes:
        parts: the parts.
        group: the processes that read together; None for one alone.
    """

    parts: Parts
    group: Any

    def place(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.group is not None:
            return self.parts.place(like, self.group)
        return {name: value.to(like[name].device) for name, value in self.parts.whole(like).items()}

    def weights(self) -> dict[str, Tensor]:
        whole = self.parts.whole([name for name in self.tensors if name.startswith("model.")])
        return {name.removeprefix("model."): value for name, value in whole.items()}


def find_checkpoint(folder: Path, group: Any = None) -> Checkpoint | None:
    """The last checkpoint in a folder ``checkpoint``, or None; parts are read by the processes of ``group`` together.

    If a kill came between the commit of one kind and the removal of the other, both are there: the later step is the last.

    Raises:
        CheckpointError: a file that is truncated, damaged or of another kind, a part that is missing.
    """
    found = [read_saved(folder / name, group) for name in (LATEST, WHOLE) if (folder / name).exists()]
    return max(found, key=lambda one: one.progress["step"], default=None)


def read_saved(path: Path, group: Any = None) -> Checkpoint:
    """The checkpoint that a file commits: in parts if it is a ``latest.json``, else whole. Raises as ``find_checkpoint``."""
    if path.name != LATEST:
        return read_checkpoint(path)
    try:
        latest = read_json(path)
    except ValueError as error:
        raise CheckpointError(f"{error}; it is truncated or damaged") from None
    if (stated := latest.get("format")) != _FORMAT:
        raise CheckpointError(f"{path} is no training state of longnet: its format is {stated!r}, expected {_FORMAT!r}")
    if latest.pop("digest", None) != _digest(latest):
        raise CheckpointError(f"{path} is damaged: its content does not match its digest")
    progress = check_progress(path, latest["progress"])
    parts = Parts.from_dict(path.parent, latest)
    parts.check_sizes()
    return ShardedCheckpoint(path, parts.tensors, progress, parts, group)


def remove_others(folder: Path, last: Path | None) -> None:
    """Remove from a folder ``checkpoint`` all but the checkpoint that ``last`` commits: older ones and unfinished ones."""
    current = read_json(last)["folder"] if last is not None and last.name == LATEST else None
    for name in (LATEST, WHOLE):
        (folder / f".{name}.partial").unlink(missing_ok=True)
        if last is None or name != last.name:
            (folder / name).unlink(missing_ok=True)
    for step in folder.glob("step-*"):
        if step.name != current:
            shutil.rmtree(step)


class ShardedSaves:
    """The saves of a run, one at a time, in the background. All its processes make the same calls.

    Args:
        folder: the run's folder ``checkpoint``.
        group: all processes, over the host; nothing else uses it.
        committed: called in the first process with each checkpoint, in the background. An error of it ends the run.
    """

    def __init__(self, folder: Path, group: Any, committed: Callable[[Checkpoint], None]) -> None:
        self._folder, self._group, self._committed = folder, group, committed
        self._saving: Future[Any] | None = None

    def begin(self, tensors: dict[str, Tensor], progress: Mapping[str, Any]) -> None:
        """Wait for the save before, copy this process's shards, and return while they are written.

        Args:
            tensors: sharded ones, and plain ones that all processes have alike or one has alone.
            progress: of a ``Checkpoint``; the first process writes its own.

        Raises: as :meth:`wait`.
        """
        self.wait()

        def commit(parts: Parts) -> None:
            latest, path = {"format": _FORMAT, "progress": dict(progress), **parts.to_dict()}, self._folder / LATEST
            write_text(path, json.dumps({**latest, "digest": _digest(latest)}) + "\n")
            remove_others(self._folder, path)
            self._committed(ShardedCheckpoint(path, parts.tensors, dict(progress), parts, None))

        saving = async_save(
            tensors,
            storage_writer=PartWriter(self._folder / f"step-{progress['step']}", commit),
            planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=self._group,
        )
        assert isinstance(saving, Future)
        self._saving = saving

    @property
    def has_failed(self) -> bool:
        """Whether :meth:`wait` would raise; other processes may learn it later."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def wait(self) -> None:
        """Return once the last save is committed.

        Raises:
            OSError: one of the processes could not write a file; all of them raise.
        """
        saving, self._saving = self._saving, None
        try:
            if saving is not None:
                saving.result()
        except CheckpointException as error:
            raise first_failure(error) from None

    def settle(self) -> None:
        """Let the last save end, well or not: the run has an error to report already."""
        with suppress(Exception):
            self.wait()


def _digest(latest: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(latest, sort_keys=True).encode(), digest_size=16).hexdigest()
