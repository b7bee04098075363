"""Tensors in parts, one safetensors file a process. ``torch.distributed.checkpoint`` (DCP) plans who writes and reads what.

A part holds shards, each named by its tensor, ``@`` and the place of its first element. A tensor that several processes have
whole is written once. No pickle.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from longnet.training.checkpoint import CheckpointError, StateKind, read_safetensors, write_safetensors

PART = StateKind("part of a training state", "longnet-training-part", {})


class Shard(NamedTuple):
    """A block of a tensor: the file that holds it, the place of its first element, its shape."""

    part: str
    first: Collection[int]
    shape: Collection[int]

    @property
    def region(self) -> tuple[slice, ...]:
        """Its elements in the whole tensor."""
        return _region(self.first, self.shape)


@dataclass(frozen=True)
class Parts:
    """The parts of one save, as they lie in ``folder``.

    Attributes:
        save: a random name of the save; each part holds it.
        sizes: of the files, in bytes.
        tensors: by name, on the meta device: shapes and dtypes.
        shards: by name, the shards that make up a tensor.
    """

    folder: Path
    save: str
    sizes: dict[str, int]
    tensors: dict[str, Tensor]
    shards: dict[str, list[Shard]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the name of the folder."""
        tensors = {
            name: {"dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape), "shards": self.shards[name]}
            for name, x in self.tensors.items()
        }
        return {"folder": self.folder.name, "save": self.save, "parts": self.sizes, "tensors": tensors}

    @classmethod
    def from_dict(cls, parent: Path, values: Mapping[str, Any]) -> Parts:
        """The inverse of ``to_dict`` for a folder in ``parent``."""
        entries = values["tensors"].items()
        tensors = {
            name: torch.empty(one["shape"], dtype=getattr(torch, one["dtype"]), device="meta") for name, one in entries
        }
        shards = {name: [Shard(*shard) for shard in one["shards"]] for name, one in entries}
        return cls(parent / values["folder"], values["save"], values["parts"], tensors, shards)

    def check_sizes(self) -> None:
        """Raise CheckpointError for a part that is missing or has another size; its content is checked when it is read."""
        for name, size in self.sizes.items():
            part = self.folder / name
            if not part.is_file():
                raise CheckpointError(f"{part} is not there: expected a file of {size:,} bytes")
            if (own := part.stat().st_size) != size:
                raise CheckpointError(
                    f"{part} holds {own:,} bytes, expected {size:,}: it is damaged, or another file took its place"
                )

    def read(self, parts: Collection[str]) -> Iterator[dict[str, Tensor]]:
        """The shards in each of the files ``parts``, by their names there.

        Raises:
            CheckpointError: a part that is missing, truncated, damaged or of another save.
        """
        for path in (self.folder / part for part in sorted(parts)):
            shards, metadata = read_safetensors(path, PART)
            if metadata.get("save") != self.save:
                raise CheckpointError(f"{path} is of another save ({metadata.get('save')}): expected {self.save}")
            yield shards

    def whole(self, names: Collection[str]) -> dict[str, Tensor]:
        """Whole tensors, on the CPU. Raises as ``read``."""
        values = {name: torch.empty_like(self.tensors[name], device="cpu") for name in names}
        for shards in self.read({shard.part for name in names for shard in self.shards[name]}):
            for name, value in values.items():
                for shard in self.shards[name]:
                    if (part := shards.get(_key(name, shard.first))) is not None:
                        value[shard.region] = part
        return values

    def place(self, like: Mapping[str, Tensor], group: Any) -> dict[str, Tensor]:
        """Tensors on the devices of ``like`` and sharded as these are; all processes of ``group`` call. Raises as ``read``."""
        state = {name: torch.empty_like(x, dtype=self.tensors[name].dtype) for name, x in like.items()}
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            load(state, storage_reader=_PartReader(self), planner=planner, process_group=group)
        except CheckpointException as error:
            raise first_failure(error) from None
        return state


def first_failure(error: CheckpointException) -> BaseException:
    """What the first of the processes that failed has raised."""
    return error.failures[min(error.failures)][0]


class _Unchanged:
    """What DCP asks of every storage, and needs no answer here."""

    @classmethod
    def validate_checkpoint_id(cls, _: object) -> bool:
        return False

    def reset(self, _: object = None) -> None:
        pass

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan


class PartWriter(_Unchanged, StorageWriter):
    """Writes the parts of one save into ``folder``, which is made.

    Args:
        committed: called in the first process once all parts are on disk. What it raises fails the save in all processes.
    """

    def __init__(self, folder: Path, committed: Callable[[Parts], None]) -> None:
        self._folder, self._committed, self._save = folder, committed, ""

    def set_up_storage_writer(self, *_: Any) -> None:
        pass

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """In the first process: name the save and its parts."""
        self._folder.mkdir(parents=True)
        self._save = secrets.token_hex(16)
        names = [f"part-{number}-of-{len(plans)}.safetensors" for number in range(1, len(plans) + 1)]
        return [replace(plan, storage_data=(self._save, name)) for plan, name in zip(plans, names, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        save, name = plan.storage_data
        shards: dict[str, Tensor] = {}
        for item in plan.items:
            shard = planner.resolve_data(item)
            assert isinstance(shard, Tensor) and item.index.offset is not None
            shards[_key(item.index.fqn, item.index.offset)] = shard.detach().to("cpu").contiguous()
        write_safetensors(self._folder / name, shards, PART, {"save": save})
        return _done([WriteResult(item.index, 0, name) for item in plan.items])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        part_of = {result.index: result.storage_data for written in results for result in written}
        sizes = {part: (self._folder / part).stat().st_size for part in sorted({*part_of.values()})}
        tensors, shards = {}, {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            # A process may have no row of a tensor.
            blocks = [(tuple(block.offsets), tuple(block.sizes)) for block in entry.chunks if prod(block.sizes)]
            shards[name] = [Shard(part_of[MetadataIndex(name, first)], first, shape) for first, shape in blocks]
        self._committed(Parts(self._folder, self._save, sizes, tensors, shards))


class _PartReader(_Unchanged, StorageReader):
    """Reads the shards that DCP asks for."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def read_metadata(self, *_: Any) -> Metadata:
        entries: dict[str, Any] = {}
        for name, x in self._parts.tensors.items():
            blocks = [(torch.Size(shard.first), torch.Size(shard.shape)) for shard in self._parts.shards[name]]
            chunks = [ChunkStorageMetadata(*block) for block in blocks]
            entries[name] = TensorStorageMetadata(TensorProperties(dtype=x.dtype), x.shape, chunks)
        return Metadata(entries)

    def set_up_storage_reader(self, *_: Any) -> None:
        pass

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        part_of = {
            _key(name, shard.first): shard.part for name, shards in self._parts.shards.items() for shard in shards
        }
        items: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            assert item.storage_index.offset is not None
            items.setdefault(_key(item.storage_index.fqn, item.storage_index.offset), []).append(item)
        for shards in self._parts.read({part_of[key] for key in items}):
            for key in shards.keys() & items.keys():
                for item in items[key]:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(shards[key][_region(item.storage_offsets, item.lengths)])
                    planner.commit_tensor(item, target)
        return _done(None)


def _key(name: str, first: Collection[int]) -> str:
    return f"{name}@{','.join(map(str, first))}"


def _region(first: Collection[int], shape: Collection[int]) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(first, shape, strict=True))


def _done(value: Any) -> Any:
    done: Future[Any] = Future()
    done.set_result(value)
    return done
