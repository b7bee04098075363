"""Who computes what in a persistent launch: items are shared out so that every program has the same work.

An item's cost is known beforehand, the blocks that it meets, and differs: rows that five branches select meet five ranges.
Taken in turn, items leave some programs with an eighth more than the mean when each has thirty, but what one program reads
from memory its neighbours find in the cache. So few items are dealt out by cost, many in turn. Results do not depend on it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from longnet.geometry.nests import Nest


@dataclass
class _Order:
    """A launch's items, and when they will be there: another stream may ask for them before that."""

    items: Tensor
    ready: torch.cuda.Event | None


# Measured on one H200: with more items each, programs that are dealt the same work drift too far apart for the cache.
_MOST_ROUNDS = 128

_ORDERS: OrderedDict[tuple[object, ...], _Order] = OrderedDict()
_MOST_ORDERS = 64
# A captured graph reads them at every replay and holds no reference: these are never given up.
_CAPTURED: dict[tuple[object, ...], Tensor] = {}


def item_order(
    nest: Nest,
    shape: tuple[tuple[int, ...], ...],
    length: int,
    copies: int,
    programs: int,
    *,
    owned: int,
    swept: int,
    is_causal: bool,
    sweeps_later: bool,
    device: torch.device,
) -> Tensor:
    """The items of a launch, (items,) int32 on the device: program p takes those at p, p + programs, ...

    Args:
        shape: of the kernels, see :func:`longnet.backends.launches.kernel_arguments`.
        copies: batch rows times heads.
        owned, swept: rows of an item, and of a block that it meets.
        sweeps_later: a causal item meets what comes after it (keys), not before (queries).
    """
    key = (nest, length, copies, programs, owned, swept, is_causal, sweeps_later, device)

    def make() -> Tensor:
        costs = item_costs(
            nest, shape, length, owned=owned, swept=swept, is_causal=is_causal, sweeps_later=sweeps_later, device=device
        )
        if len(costs) * copies <= _MOST_ROUNDS * programs:
            return share_out(costs.repeat(copies), programs)
        segments = -(-length // nest.segment_lengths[0])
        # Of a causal segment's queries the last meet most: first they come, so that the last round is short.
        return in_turn(
            segments * copies, len(costs) // segments, last_first=is_causal and not sweeps_later, device=device
        )

    found = _ORDERS.get(key)
    if torch.cuda.is_current_stream_capturing():
        if found is None or found.ready is not None:
            # The graph computes it itself, at every replay.
            return make()
        return _CAPTURED.setdefault(key, found.items)
    if found is None:
        found = _ORDERS[key] = _Order(make(), torch.cuda.Event())
        assert found.ready is not None
        found.ready.record()
        if len(_ORDERS) > _MOST_ORDERS:
            _ORDERS.popitem(last=False)
    elif found.ready is not None:
        if found.ready.query():
            found.ready = None
        else:
            torch.cuda.current_stream().wait_event(found.ready)
    return found.items


def item_costs(
    nest: Nest,
    shape: tuple[tuple[int, ...], ...],
    length: int,
    *,
    owned: int,
    swept: int,
    is_causal: bool,
    sweeps_later: bool,
    device: torch.device,
) -> Tensor:
    """Blocks that each tile of each segment of one head meets, and one for its beginning and end: (segments * tiles,)."""
    lengths, rates = nest.segment_lengths, nest.dilation_rates
    levels, _, steps, _, counts = shape[2:]
    start = torch.arange(0, length, lengths[0], device=device)[:, None]
    size = (length - start).clamp(max=lengths[0])
    by_class = []
    for number, (level, step, count) in enumerate(zip(levels, steps, counts, strict=True)):
        first_row = torch.arange(count, device=device) * owned
        # Every residue of the class has as many tiles.
        first_row = first_row.repeat(nest.classes[number].residues)
        own = -(-size // rates[0])
        if is_causal:
            before = first_row * step // rates[0]
            own = own - before if sweeps_later else torch.minimum(own, before + owned * step // rates[0])
        cost = 1 + _blocks(own, swept)
        for branch in range(1, level):
            low = start // lengths[branch] * lengths[branch]
            middle = start // lengths[branch - 1] * lengths[branch - 1]
            after = (low + lengths[branch]).clamp(max=length) - (middle + lengths[branch - 1])
            sides = [after] if is_causal and sweeps_later else [middle - low] if is_causal else [middle - low, after]
            for side in sides:
                cost = cost + _blocks(-(-side // rates[branch]), swept)
        by_class.append(torch.where(first_row * step < size, cost, 0))
    return torch.cat(by_class, 1).flatten()


def _blocks(rows: Tensor, swept: int) -> Tensor:
    return -(-rows.clamp(min=0) // swept)


def in_turn(groups: int, tiles: int, *, last_first: bool, device: torch.device) -> Tensor:
    """All tiles of one segment and head after another, each time from another tile on, so that every program meets each."""
    tile = torch.arange(tiles, dtype=torch.int32, device=device)
    group = torch.arange(groups, dtype=torch.int32, device=device)[:, None]
    tile = (tile + group) % tiles
    return (group * tiles + (tiles - 1 - tile if last_first else tile)).flatten()


def share_out(costs: Tensor, programs: int) -> Tensor:
    """The costliest first, dealt out to and fro so that sums stay level; then each program in the items' own order."""
    items = len(costs)
    rank = torch.argsort(costs, descending=True, stable=True)
    rounds = -(-items // programs)
    dealt = torch.full((rounds * programs,), items, dtype=torch.int32, device=costs.device)
    dealt[:items] = rank.to(torch.int32)
    dealt = dealt.view(rounds, programs)
    # Not the last round, whose places past the end belong to nobody.
    dealt[1 : rounds - 1 : 2] = dealt[1 : rounds - 1 : 2].flip(1)
    return dealt.sort(0).values.flatten()[:items].contiguous()
