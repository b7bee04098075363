"""Matrices cut by rows over ranks: each rank gets some whole, and every rank its rows back."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from longnet.training.row_shards import RowShards, own_rows

# (matrices, rows, columns): fewer matrices or rows than ranks, and numbers that three does not divide.
SHAPES = [(1, 3, 2), (2, 2, 5), (7, 1, 3), (4, 10, 3), (3, 4, 4), (1, 1, 1)]


def exchanged(group, rank, size):
    """The matrices that this rank got, and whether what it gave back were its rows of all, for each shape and dtype."""
    mesh, found = DeviceMesh.from_group(group, "cpu"), []
    for count, height, width in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(count, height, width, generator=torch.Generator().manual_seed(0)).to(dtype)
            cut = [distribute_tensor(one, mesh, [Shard(0)], src_data_rank=None) for one in x]
            rows = torch.stack([own_rows(one) for one in cut])
            shards = RowShards(cut[0], count)
            got = shards.gather(rows)
            found.append((got, torch.equal(shards.scatter(got), rows)))
    return found


def test_ranks_get_whole_matrices_and_their_rows_back(ranks):
    of_ranks, place = ranks(3, exchanged, 3), 0
    for count, height, width in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(count, height, width, generator=torch.Generator().manual_seed(0)).to(dtype)
            parts = [found[place][0] for found in of_ranks]
            assert torch.equal(torch.cat(parts), x)
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            assert all(found[place][1] for found in of_ranks)
            place += 1


def refused(group, rank, size):
    mesh = DeviceMesh.from_group(group, "cpu")
    for placement in (Shard(1), Replicate()):
        with pytest.raises(ValueError, match=r"has the placements .*: expected \(Shard\(0\),\), as FSDP2 gives"):
            RowShards(distribute_tensor(torch.ones(4, 4), mesh, [placement], src_data_rank=None), 2)
    return True


def test_what_is_cut_otherwise_is_refused(ranks):
    assert ranks(2, refused, 2) == [True, True]
