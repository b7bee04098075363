"""Which part of a shared sequence a rank holds."""

from __future__ import annotations

from typing import Any

import torch

from longnet.attention.sharding.group import lengths_of, peers_of
from longnet.runtime.tracing import untraced


def group_of(distributed: Any) -> Any:
    """The group that a module's option ``distributed`` stands for, None for none.

    Raises:
        ValueError: True, and no default process group.
    """
    if distributed is False:
        return None
    if distributed is not True:
        return distributed
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ValueError(
            "distributed=True needs a process group and none is initialised: call "
            "torch.distributed.init_process_group first, or start with torchrun"
        )
    return torch.distributed.group.WORLD


# Ranks talk here: nothing that a graph could hold.
@untraced
def shard_place(group: Any, length: int) -> tuple[int, int]:
    """(where this rank's shard of ``length`` tokens begins, the length of the whole sequence)."""
    peers = peers_of(group)
    if peers.size == 1:
        return 0, length
    shards = lengths_of(peers, length)
    return shards.start(peers.rank), shards.total
