"""The ranks that share a sequence, and what they agree on before any of them sends rows."""

from __future__ import annotations

import hashlib
import logging
import struct
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from longnet.geometry import Pattern
from longnet.geometry.shards import Shards

_log = logging.getLogger("longnet")

P = ParamSpec("P")
T = TypeVar("T")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Peers:
    """The ranks of one sequence, in order.

    Args:
        group: over which rows travel.
        rank: of this process in it.
        size: how many there are.
    """

    group: dist.ProcessGroup
    rank: int
    size: int


def peers_of(group: Any) -> Peers:
    """The ranks of a ``ProcessGroup``, or of a ``DeviceMesh`` of one dimension.

    Raises:
        TypeError: something else. ValueError: a mesh of several dimensions, or a group that this process is not in.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"group={group!r} given and no process group is initialised: call torch.distributed.init_process_group first, "
            "or start with torchrun"
        )
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group is a mesh of {group.ndim} dimensions {group.mesh_dim_names}: expected one, as in mesh['cp']"
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group has type {type(group).__name__}: expected a ProcessGroup, a DeviceMesh or None")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"group={group.group_name!r} does not hold this process: expected a group that it is in")
    return Peers(group, rank, dist.get_world_size(group))


@cache
def _talks_on_the_host(backend: str) -> bool:
    if "gloo" in backend:
        return True
    _log.warning(
        "the process group's backend is %r: ranks agree over the GPU, for which the host has to wait in every layer. "
        "init_process_group() without a backend, or with 'cpu:gloo,cuda:nccl', lets them agree on the host",
        backend,
    )
    return False


@dataclass(frozen=True)
class Terms:
    """What a call over ranks is about; all ranks must say the same."""

    batch: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    gradients: bool
    kv_heads: int = 0
    is_causal: bool = False
    mask: bool = False
    bias: int = 0
    scale: float = 0.0
    pattern: Pattern | None = None
    segment_offset: int | tuple[int, ...] = 0

    def numbers(self) -> list[int]:
        """The terms as int64, for comparison."""
        pattern, segment_offset = (
            int.from_bytes(hashlib.blake2b(repr(one).encode(), digest_size=7).digest())
            for one in (self.pattern, self.segment_offset)
        )
        return [
            self.batch, self.heads, self.head_dim, DTYPES.index(self.dtype), self.gradients, self.kv_heads, self.is_causal,
            self.mask, self.bias, struct.unpack("<q", struct.pack("<d", self.scale))[0], pattern, segment_offset,
        ]  # fmt: skip


def agree(peers: Peers, length: int, terms: Terms) -> Shards:
    """Everybody's shard length, once all ranks are known to be about the same call.

    Raises:
        ValueError: on every rank, when ranks differ or one of them could not make its call.
    """
    table = _gather(peers, [length, *terms.numbers()])
    if (table[:, 0] < 0).any():
        _raise_together(peers, None)
    if (table[:, 1:] != table[0, 1:]).any():
        said: list[Any] = [None] * peers.size
        dist.all_gather_object(said, terms, group=peers.group)
        differing = [
            f"{name} is {', '.join(f'{getattr(one, name)} on rank {rank}' for rank, one in enumerate(said))}"
            for name in (field.name for field in fields(Terms))
            if len({getattr(one, name) for one in said}) > 1
        ]
        raise ValueError(f"the ranks of one sequence differ: {'; '.join(differing)}. Expected the same on all")
    return Shards(tuple(table[:, 0].tolist()))


def broadcast_error(peers: Peers, error: Exception) -> None:
    """Tell the other ranks, which wait in :func:`agree`, that this one raises ``error``; they raise it too."""
    _gather(peers, [-1, *[0] * len(fields(Terms))])
    _raise_together(peers, error)


def lengths_of(peers: Peers, length: int) -> Shards:
    """Everybody's shard length."""
    return Shards(tuple(_gather(peers, [length])[:, 0].tolist()))


def _gather(peers: Peers, numbers: list[int]) -> Tensor:
    """(ranks, numbers) int64."""
    device = "cpu" if _talks_on_the_host(dist.get_backend(peers.group)) else "cuda"
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    table = own.new_empty(peers.size, len(numbers))
    dist.all_gather(list(table), own, group=peers.group)
    return table.cpu()


def _raise_together(peers: Peers, error: Exception | None) -> None:
    said: list[Any] = [None] * peers.size
    dist.all_gather_object(said, None if error is None else str(error), group=peers.group)
    if error is None:
        reasons = [f"rank {rank} says: {one}" for rank, one in enumerate(said) if one is not None]
        raise ValueError(f"another rank of this sequence could not make its call: {'; '.join(reasons)}")
