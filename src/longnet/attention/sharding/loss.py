"""A mean over positions that are spread over ranks."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def mean_over(group: dist.ProcessGroup, total: Tensor, count: Tensor) -> Tensor:
    """The mean of all ranks' positions from this rank's ``total`` and ``count``, both (): 0 where nothing counts.

    Its value is the same on every rank. Its gradients are such that their mean over the ranks, as FSDP and DDP take it, is
    the gradient of the mean over all positions, however many a rank has.
    """
    sums = total.detach().new_zeros(2)
    sums[0], sums[1] = total.detach(), count
    dist.all_reduce(sums, group=group)
    whole = sums[1].clamp(min=1)
    own = total * (dist.get_world_size(group) / whole)
    return own + (sums[0] / whole - own.detach())
