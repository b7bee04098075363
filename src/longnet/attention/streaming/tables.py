"""What a step asks of a layout, as tensors on its device."""

from __future__ import annotations

from itertools import accumulate, groupby

import torch
from torch import Tensor

from longnet.geometry.layout import Layout


class StepTables:
    """A layout's constants on the device. Lanes are ordered by their branch's number of rows."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        pattern, heads = layout.pattern, layout.heads
        # The most rows that a lane has in each branch.
        rows = [branch.rows(branch.segment_length, 0) for branch in pattern.branches]
        order = sorted(range(len(rows)), key=rows.__getitem__)
        offsets = [[pattern.offset(branch, j, heads) for j in range(heads)] for branch in pattern.branches]
        # Of every branch, the heads of each offset, up to the first past which there are none.
        members = [
            [[head for head in range(heads) if own[head] == offset] for offset in range(max(own) + 2)]
            for own in offsets
        ]
        most = [max(map(len, by_offset)) for by_offset in members]
        lanes = [(index, lane) for index in order for lane in range(most[index])]
        where = {pair: number for number, pair in enumerate(lanes)}
        lane_of = [
            [where[i, members[i][offset].index(head)] for head, offset in enumerate(own)]
            for i, own in enumerate(offsets)
        ]
        # A lane's head by the offset that selects a position: a lane without one repeats its branch's first, and where no
        # head has this offset there is none, -1.
        head_at = [
            own[lane] if lane < len(own) else own[0] if own else -1 for index, lane in lanes for own in members[index]
        ]
        *starts, _ = accumulate((len(members[index]) for index, _ in lanes), initial=0)

        def table(numbers: object, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(numbers, dtype=dtype, device=device)

        self.grid = table(pattern.grid, torch.int64)
        self.offsets = table(offsets)
        self.last_offsets = table([len(by_offset) - 1 for by_offset in members], torch.int64)
        self.first_rows = table(layout.first_rows(), torch.int64)
        self.lane_branch = table([index for index, _ in lanes])
        self.head_at, self.lane_starts = table(head_at), table(starts, torch.int64)
        self.lane_of = table(lane_of)
        # By branch in the pattern's order, and the most rows that a lane has.
        self.lane_counts, self.most_rows = tuple(most), max(rows)
        # (lanes, rows) of the branches with equally many rows.
        alike = groupby(order, key=rows.__getitem__)
        self.families = [(sum(most[index] for index in indices), width) for width, indices in alike]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, Tensor))
