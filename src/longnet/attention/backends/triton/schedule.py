"""Who computes what in a persistent launch: items are shared out so that every program has the same work.

An item's cost is known beforehand, the blocks that it meets, and differs: rows that five branches select meet five ranges.
Taken in turn, items leave some programs with much more than others when each has few. What one program reads from
memory its neighbours find in the cache, if they stay side by side; over thousands of items each they drift apart. So items
are dealt out by cost, and long sequences have several launches, each of which brings all programs together again. Results
do not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longnet.attention.backends.triton.launches import NestShape
from longnet.geometry.needed_rows import NeededRows, swept_limits
from longnet.geometry.nests import Nest
from longnet.geometry.pattern import HeadOffsets, head_offset
from longnet.hashed import hash_once
from longnet.runtime.cache import GraphSafeCache


@hash_once
@dataclass(frozen=True)
class Schedule:
    """The items of one kernel over one nest.

    Args:
        copies: batch rows times heads.
        programs: that run at once, at most.
        rounds: items of a program in one launch, at most.
        owned, swept: rows of an item, and of a block that it meets.
        sweeps_later: a causal item meets what comes after it (keys), not before (queries). Items are keys then, else queries.
        needed: the query rows whose results are read, None for all; not causal.
        heads, head_offsets: of the call, which only ``needed`` needs.
        segment_offset: of the grid, None where each row of the batch has its own: costs are then those of 0.
    """

    nest: Nest
    shape: NestShape
    length: int
    copies: int
    programs: int
    rounds: int
    owned: int
    swept: int
    is_causal: bool
    sweeps_later: bool
    device: torch.device
    needed: NeededRows | None = None
    heads: int = 1
    head_offsets: HeadOffsets = "interleaved"
    segment_offset: int | None = 0

    @property
    def items(self) -> int:
        tiles = sum(count * one.residues for count, one in zip(self.shape.tiles, self.nest.classes, strict=True))
        return tiles * self.nest.segments(self.length, self.segment_offset) * self.copies

    @property
    def per_launch(self) -> int:
        """Items of a launch; the last may have fewer."""
        launches = -(-self.items // (self.rounds * self.programs))
        return -(-self.items // (launches * self.programs)) * self.programs

    def costs(self) -> Tensor:
        """The cost of every item, in order, see :meth:`head_costs`; -1 for an item without a needed row."""
        if self.needed is None:
            return self.head_costs().repeat(self.copies)
        if self.sweeps_later:
            limits = swept_limits(self.nest, self.needed, self.head_offsets, self.heads, self.length)
            by_head = [self.head_costs(limits[head]) for head in range(self.heads)]
        else:
            all_of_them = self.head_costs()
            by_head = [torch.where(self._needed_tiles(head), all_of_them, -1) for head in range(self.heads)]
        return torch.cat(by_head).repeat(self.copies // self.heads)

    def _needed_tiles(self, head: int) -> Tensor:
        """Whether some row of each tile of each segment of a head is needed, (segments * tiles,)."""
        assert self.needed is not None
        starts = self.nest.branches[0].starts(self.length)
        by_class = []
        for one, count in zip(self.nest.classes, self.shape.tiles, strict=True):
            rows = one.first_rows(head_offset(self.head_offsets, head, self.heads, one.step))
            firsts = [[start + row for row in rows] for start in starts]
            limits = [[self.needed.limit(first, one.step) for first in row] for row in firsts]
            first, limit = (torch.tensor(rows, device=self.device)[..., None] for rows in (firsts, limits))
            tiles = torch.arange(count, device=self.device) * (self.owned * one.step)
            by_class.append((first + tiles < limit).flatten(1))
        return torch.cat(by_class, 1).flatten()

    def head_costs(self, limits: tuple[int, ...] | None = None) -> Tensor:
        """Blocks that each tile of each segment of one head meets, and one for its beginning and end: (segments * tiles,).

        Args:
            limits: by branch, the position at which what is met ends.
        """
        finest, *coarser = self.nest.branches
        ends = [self.length] * len(self.nest.branches) if limits is None else limits
        origin = self.nest.branches[-1].origin(self.segment_offset or 0)
        segments = torch.arange(self.nest.segments(self.length, self.segment_offset), device=self.device)[:, None]
        # Where a segment starts on the grid, and its first token.
        start = finest.segment_start(origin) + segments * finest.segment_length
        first = (start - origin).clamp(min=0)
        size = ((finest.segment_stop(start) - origin).clamp(max=self.length) - first).clamp(min=0)
        met = torch.minimum(size, (ends[0] - first).clamp(min=0))
        by_class = []
        for one, count in zip(self.nest.classes, self.shape.tiles, strict=True):
            # Every residue of the class has as many tiles.
            first_row = (torch.arange(count, device=self.device) * self.owned).repeat(one.residues)
            own = finest.rows(met, 0)
            if self.is_causal:
                # Counted in rows of the finest branch: the class selects every ``ratio``-th of them.
                ratio = finest.rows(one.step, 0)
                before = first_row * ratio
                own = own - before if self.sweeps_later else torch.minimum(own, before + self.owned * ratio)
            cost = 1 + self._blocks(own)
            for finer, branch, end in zip(self.nest.branches, coarser[: one.level - 1], ends[1:], strict=False):
                if not self.is_causal or self.sweeps_later:
                    after = (branch.segment_stop(start) - origin).clamp(max=end) - (finer.segment_stop(start) - origin)
                    cost = cost + self._blocks(branch.rows(after, 0))
                if not self.is_causal or not self.sweeps_later:
                    earlier = (finer.segment_start(start) - origin).clamp(max=end)
                    earlier = earlier - (branch.segment_start(start) - origin).clamp(min=0)
                    cost = cost + self._blocks(branch.rows(earlier, 0))
            by_class.append(torch.where(first_row * one.step < size, cost, 0))
        return torch.cat(by_class, 1).flatten()

    def _blocks(self, rows: Tensor) -> Tensor:
        return -(-rows.clamp(min=0) // self.swept)

    def order(self) -> Tensor:
        """All items, (items,) int32, launch after launch; of a launch's program p takes those at p, p + programs, ...

        An item none of whose rows is needed is -1: kernels treat it as an item without rows.
        """
        costs = self.costs()
        each = self.per_launch
        whole = len(costs) // each * each
        orders = share_out(costs[:whole].view(-1, each), self.programs)
        orders += torch.arange(0, whole, each, dtype=torch.int32, device=self.device)[:, None]
        rest = share_out(costs[None, whole:], self.programs) + whole
        order = torch.cat((orders.flatten(), rest.flatten()))
        return order if self.needed is None else torch.where(costs[order] < 0, -1, order)


def share_out(costs: Tensor, programs: int) -> Tensor:
    """(launches, items) costs to the launches' items, int32, see :meth:`Schedule.order`.

    The costliest first, dealt out to and fro so that sums stay level; then each program's in their own order.
    """
    launches, items = costs.shape
    rank = torch.argsort(costs, dim=1, descending=True, stable=True).to(torch.int32)
    rounds = -(-items // programs)
    dealt = torch.full((launches, rounds * programs), items, dtype=torch.int32, device=costs.device)
    dealt[:, :items] = rank
    dealt = dealt.view(launches, rounds, programs)
    # Not the last round, whose places past the end belong to nobody.
    dealt[:, 1 : rounds - 1 : 2] = dealt[:, 1 : rounds - 1 : 2].flip(2)
    return dealt.sort(1).values.flatten(1)[:, :items]


_ORDERS = GraphSafeCache(64)


def cached_order(schedule: Schedule) -> Tensor:
    """The schedule's order, made when it is first asked for; for work on the current stream of a CUDA device."""
    return _ORDERS.get(schedule, schedule.device, schedule.order)


_LIMITS = GraphSafeCache(64)


def cached_limits(schedule: Schedule) -> Tensor:
    """:func:`swept_limits` of the needed rows as (heads, branches) int32."""
    assert schedule.needed is not None
    limits = swept_limits(schedule.nest, schedule.needed, schedule.head_offsets, schedule.heads, schedule.length)
    make = lambda: torch.tensor(limits, dtype=torch.int32).to(schedule.device)  # noqa: E731
    return _LIMITS.get(schedule, schedule.device, make)
