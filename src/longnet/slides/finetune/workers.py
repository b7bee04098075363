"""Processes that fine-tune one model together: each takes its share of the slides of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from longnet.gigapath import SlideEncoder

Result = TypeVar("Result")


class Workers:
    """This process among those of a group; alone without one.

    Args:
        group: all of its processes call the same methods in the same order.

    Attributes:
        is_first: whether this process prints and writes for all.
        size: the number of processes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self._rank = 0 if group is None else dist.get_rank(group)
        self.is_first = self._rank == 0

    def share(self, slides: Sequence[int]) -> list[tuple[int, bool]]:
        """This process's slides of a sequence, and whether each is its own.

        Every process gets equally many, as collective operations need it: where slides do not divide, some get the first slide
        as a filler, which must not count.
        """
        rounds = -(-len(slides) // self.size)
        places = (turn * self.size + self._rank for turn in range(rounds))
        return [(slides[place], True) if place < len(slides) else (slides[0], False) for place in places]

    def merge(self, values: Mapping[int, Any]) -> dict[int, Any]:
        """The values of all processes, on each of them; sorted by key."""
        parts: list[Any] = [dict(values)]
        if self._group is not None:
            parts = [None] * self.size
            dist.all_gather_object(parts, dict(values), group=self._group)
        return dict(sorted(item for part in parts for item in part.items()))

    def first_of(self, value: Any) -> Any:
        """The value of the first process, on all of them."""
        return self.merge({self._rank: value})[0]

    def agree(self, error: Exception | None) -> None:
        """Raise the ``error`` of the first process on all of them, if it has one."""
        if (first := self.first_of(error)) is not None:
            raise first

    def on_first(self, do: Callable[[], Result]) -> Result:
        """What ``do`` gives on the first process, on all of them; its ValueError or OSError is raised on all."""
        result, error = None, None
        if self.is_first:
            try:
                result = do()
            except (ValueError, OSError) as refusal:
                error = refusal
        self.agree(error)
        return cast(Result, self.first_of(result))

    def any_of(self, value: bool) -> bool:
        """Whether the value of any process is true."""
        return any(self.merge({self._rank: value}).values())

    def wrap(self, model: nn.Module, parallel: str, device: torch.device) -> nn.Module:
        """The module to call: DDP around the model, or the model sharded by FSDP2 with each block of its encoder a unit.

        Weights are those of the first process with DDP, those of each process with FSDP: give all the same.
        """
        if self._group is None:
            return model
        if parallel == "ddp":
            return DistributedDataParallel(
                model, device_ids=[device] if device.type == "cuda" else None, process_group=self._group
            )
        mesh = DeviceMesh.from_group(self._group, device.type)
        for encoder in [module for module in model.modules() if isinstance(module, SlideEncoder)]:
            for block in encoder.blocks:
                fully_shard(block, mesh=mesh)
        # By default FSDP2 leaves the root's weights gathered after a forward pass.
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        return model


@contextmanager
def gradients_stay(model: nn.Module, stay: bool) -> Iterator[None]:
    """While gradients of several slides add up, processes exchange them after the last alone."""
    if not stay:
        yield
    elif isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield
