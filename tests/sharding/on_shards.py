"""A case's call on every rank of a group: its tensors cut into shards, its results put together, and what travels.

A case has ``shards``, ``inputs()`` of the whole sequence, and ``run(inputs, group)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longnet.attention.sharding import attend, ranges

# Which dimension of a tensor is the sequence.
TOKENS = {"query": 2, "key": 2, "value": 2, "grad": 2, "grad_lse": 2, "mask": 1, "out": 2, "lse": 2}


def shard_of(case: Any, rank: int) -> dict[str, Tensor | None]:
    return {
        name: x.split(case.shards, TOKENS[name])[rank] if x is not None and name in TOKENS else x
        for name, x in case.inputs().items()
    }


def run_shard(group: object, rank: int, case: Any) -> dict[str, Tensor]:
    return case.run(shard_of(case, rank), group)


def run_in_rectangles(group: object, rank: int, case: Any) -> dict[str, Tensor]:
    """Where every query reads all received keys, by a backend, however few they are."""
    usual = ranges.LEAST_ROWS
    attend.LEAST_ROWS = ranges.LEAST_ROWS = 1
    try:
        return run_shard(group, rank, case)
    finally:
        attend.LEAST_ROWS = ranges.LEAST_ROWS = usual


def together(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The shards' results as one sequence's; the bias belongs to all, and its gradients add up."""
    return {
        name: torch.cat([one[name] for one in results], TOKENS[name])
        if name in TOKENS
        else torch.stack([one[name] for one in results]).sum(0)
        for name in results[0]
    }


def bytes_sent(group: object, rank: int, case: Any) -> list[list[int]]:
    """What each collective call of one forward and backward pass carries to every rank."""
    counted = []
    real = torch.distributed.all_to_all_single

    def counting(into: Tensor, given: Tensor, received: list[int], sent: list[int], **options: Any) -> Any:
        counted.append(list(sent))
        return real(into, given, received, sent, **options)

    torch.distributed.all_to_all_single = counting
    try:
        run_shard(group, rank, case)
    finally:
        torch.distributed.all_to_all_single = real
    return counted
