"""Matrices whose rows are cut over processes, as FSDP2 cuts them: each process gets some of them whole, and gives rows back."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from longnet.attention.sharding.exchange import send
from longnet.distributed import shard_lengths


class RowShards:
    """How k matrices (m, n) of one shape are shared by the processes of a group, which all make the same calls.

    A process has some rows of every matrix, and works on some of the matrices. Rows and matrices are divided among the ranks in
    order, as equally as can be.
    """

    def __init__(self, matrix: DTensor, count: int) -> None:
        """Of ``count`` matrices like this one.

        Raises:
            ValueError: it is cut otherwise than by rows over one mesh axis.
        """
        if matrix.placements != (Shard(0),):
            raise ValueError(f"a matrix has the placements {matrix.placements}: expected (Shard(0),), as FSDP2 gives")
        self._group = matrix.device_mesh.get_group()
        self._rank, ranks = dist.get_rank(self._group), dist.get_world_size(self._group)
        height = matrix.shape[0]
        size = -(-height // ranks)
        self._rows = [max(0, min(size, height - rank * size)) for rank in range(ranks)]
        self._counts = shard_lengths(count, ranks)

    @property
    def _own_rows_for(self) -> tuple[int, ...]:
        """Rows of this process that each process works on."""
        return tuple(self._rows[self._rank] * count for count in self._counts)

    @property
    def _others_rows(self) -> tuple[int, ...]:
        """Rows of each process that this one works on."""
        return tuple(self._counts[self._rank] * rows for rows in self._rows)

    def gather(self, x: Tensor) -> Tensor:
        """This process's rows of all matrices, (k, own rows, n), to the matrices that it works on, (own k, m, n)."""
        rows = send(x.flatten(0, 1), self._own_rows_for, self._others_rows, self._group).wait()
        parts = zip(rows.split(list(self._others_rows)), self._rows, strict=True)
        return torch.cat([part.view(self._counts[self._rank], high, x.shape[-1]) for part, high in parts], 1)

    def scatter(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`gather`."""
        rows = torch.cat([part.flatten(0, 1) for part in x.split(self._rows, 1)])
        rows = send(rows, self._others_rows, self._own_rows_for, self._group).wait()
        return rows.view(sum(self._counts), self._rows[self._rank], x.shape[-1])


def own_rows(x: Tensor) -> Tensor:
    """What this process holds of a tensor; the storage is shared."""
    return x.to_local() if isinstance(x, DTensor) else x
