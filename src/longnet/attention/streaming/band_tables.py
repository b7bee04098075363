"""What the kernels of a single token ask of a layout with windows, all queries, blocks or offset grids, as tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from longnet.geometry.layout import Layout, head_numbers
from longnet.geometry.rows import UNBOUNDED

# Rows that a program reads, or a power of two as many where that is more than the most programs, of a reader or in all.
PART = 256
MOST_PARTS = 64
MOST_PROGRAMS = 8192


class BandTables:
    """A layout's constants on the device.

    A *reader* is one key/value head of a block and the query heads that read its rows: a program reads them once for all.
    Its rows are cut into parts of ``part_rows`` rows, a program each.
    """

    def __init__(self, layout: Layout, batch_size: int, device: torch.device) -> None:
        largest = max((block.rows for block in layout.blocks), default=0)
        least = max(largest / MOST_PARTS, batch_size * layout.rows / MOST_PROGRAMS)
        self.part_rows = PART
        while self.part_rows < least:
            self.part_rows *= 2
        readers: list[list[int]] = []
        members: list[list[int]] = []
        parts: list[list[int]] = []
        # By band (the branches, then the window) and head: its first part, how many there are, and its place among the readers'.
        self.bands = len(layout.bands)
        of_heads = [[[0, 0, 0] for _ in range(layout.heads)] for _ in layout.bands]
        for band, (branch, blocks, is_ring) in enumerate(layout.bands):
            length = 0 if branch.segment_length == UNBOUNDED else branch.segment_length
            for block in blocks:
                heads = head_numbers(block.heads)
                for number, kv_head in enumerate(head_numbers(block.kv_heads)):
                    first, own = len(parts), heads[number * block.share : (number + 1) * block.share]
                    parts += [[len(readers), low] for low in range(0, block.rows, self.part_rows)]
                    for place, head in enumerate(own):
                        of_heads[band][head] = [first, len(parts) - first, place]
                    shape = [length, branch.dilation_rate, branch.block, int(is_ring)]
                    readers.append([*shape, block.offset, block.first + number * block.rows, block.rows, kv_head])
                    members.append(own)
        self.share = max(map(len, members), default=1)
        self.parts = len(parts)

        def table(numbers: object, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(numbers, dtype=dtype, device=device)

        # Query heads and key/value heads of each block, as indices that need no copy from the host.
        self.heads = [
            tuple(own if isinstance(own, slice) else table(own, torch.int64) for own in (block.heads, block.kv_heads))
            for block in layout.blocks
        ]
        self.readers = table(readers, torch.int64)
        self.members = table([own + [-1] * (self.share - len(own)) for own in members])
        self.part_table, self.of_heads = table(parts), table(of_heads)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, Tensor))
