"""Items of persistent launches: each is computed once, and every program has the same work."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longnet.backends.launches import kernel_arguments
from longnet.backends.schedule import in_turn, item_costs, share_out
from longnet.geometry import Pattern
from longnet.geometry.nests import make_nests

CPU = torch.device("cpu")


@given(costs=st.lists(st.integers(0, 80), min_size=1, max_size=400), programs=st.integers(1, 140))
def test_every_item_is_in_one_place(costs, programs):
    programs = min(programs, len(costs))
    order = share_out(torch.tensor(costs), programs)
    assert sorted(order.tolist()) == list(range(len(costs)))
    for program in range(programs):
        mine = order[program::programs].tolist()
        assert mine == sorted(mine), "a program leaves its items' natural order"


@pytest.mark.parametrize("last_first", [False, True])
def test_items_in_turn_are_each_in_one_place(last_first):
    order = in_turn(35, 16, last_first=last_first, device=CPU)
    assert order.dtype == torch.int32
    assert sorted(order.tolist()) == list(range(35 * 16))
    # A program that takes every 16th meets every tile.
    assert len({item % 16 for item in order[3::16].tolist()}) == 16


@pytest.mark.parametrize("heads", [4, 16])
@pytest.mark.parametrize(("is_causal", "sweeps_later"), [(True, False), (True, True), (False, False)])
def test_work_is_level(is_causal, sweeps_later, heads):
    pattern = Pattern.parse((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16))
    (nest,) = make_nests(pattern, heads, 64, 64)
    _, shape = kernel_arguments(nest, nest.classes, 2048, 128)
    costs = item_costs(
        nest, shape, 131072, owned=128, swept=128, is_causal=is_causal, sweeps_later=sweeps_later, device=CPU
    ).repeat(heads)
    in_turn = torch.stack([costs[p::132].sum() for p in range(132)]).float()
    order = share_out(costs, 132).long()
    shared = torch.stack([costs[order[p::132]].sum() for p in range(132)]).float()
    assert shared.max() / shared.mean() < 1.05
    assert shared.max() < in_turn.max()


@pytest.mark.parametrize("length", [65536, 50000])
@pytest.mark.parametrize(("is_causal", "sweeps_later"), [(True, False), (True, True), (False, False)])
def test_costs_are_the_blocks_met(is_causal, sweeps_later, length):
    pattern = Pattern.parse((1024, 4096, 16384), (1, 2, 8))
    (nest,) = make_nests(pattern, 8, 64, 64)
    tiles, shape = kernel_arguments(nest, nest.classes, 1024, 128)
    costs = item_costs(
        nest, shape, length, owned=128, swept=64, is_causal=is_causal, sweeps_later=sweeps_later, device=CPU
    ).view(-1, tiles)  # fmt: skip
    for segment in (0, 1, 5, 17, len(costs) - 1):
        start = segment * 1024
        tile = 0
        for row_class in nest.classes:
            count = -(-1024 // (row_class.step * 128))
            for _ in range(row_class.residues):
                for block in range(count):
                    first, last = block * 128 * row_class.step, (block + 1) * 128 * row_class.step
                    expected = 0
                    if start + first < length:
                        expected = 1 + met(nest, row_class.level, start, first, last, length, is_causal, sweeps_later)
                    assert costs[segment, tile] == expected, (segment, tile)
                    tile += 1


def met(nest, level, start, first, last, length, is_causal, sweeps_later):
    """Blocks of 64 rows, range by range, that the rows [first, last) of the segment from ``start`` on meet."""
    blocks = 0
    for index in range(level):
        width, rate = nest.segment_lengths[index], nest.dilation_rates[index]
        low = start // width * width
        positions = list(range(low, min(low + width, length), rate))
        if index == 0:
            if is_causal and sweeps_later:
                positions = [p for p in positions if p >= start + first]
            elif is_causal:
                positions = [p for p in positions if p < start + last]
            sides = [positions]
        else:
            finer = nest.segment_lengths[index - 1]
            inside = start // finer * finer
            before = [p for p in positions if p < inside]
            after = [p for p in positions if p >= inside + finer]
            sides = ([after] if sweeps_later else [before]) if is_causal else [before, after]
        blocks += sum(-(-len(side) // 64) for side in sides)
    return blocks
