"""Items of persistent launches: each is computed once, and every program has the same work."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longnet.attention.backends.triton.launches import kernel_arguments
from longnet.attention.backends.triton.schedule import Schedule, share_out
from longnet.geometry import Pattern
from longnet.geometry.needed_rows import needed_by_first
from longnet.geometry.nests import make_nests
from longnet.geometry.pattern import head_offset

CPU = torch.device("cpu")


@given(
    costs=st.lists(st.integers(0, 80), min_size=1, max_size=400),
    programs=st.integers(1, 140),
    launches=st.integers(1, 3),
)
def test_every_item_is_in_one_place(costs, programs, launches):
    programs = min(programs, len(costs))
    for order in share_out(torch.tensor(costs).expand(launches, -1), programs):
        assert sorted(order.tolist()) == list(range(len(costs)))
        for program in range(programs):
            mine = order[program::programs].tolist()
            assert mine == sorted(mine), "a program leaves its items' natural order"


def schedule(
    pattern,
    heads,
    length,
    *,
    programs=132,
    rounds=128,
    owned=128,
    swept=128,
    is_causal=True,
    sweeps_later=False,
    **more,
):
    (nest,) = make_nests(pattern, heads, 64, 64)
    width = min(nest.segment_lengths[0], length)
    _, shape = kernel_arguments(nest, nest.classes, width, owned)
    return Schedule(nest, shape, length, heads, programs, rounds, owned, swept, is_causal, sweeps_later, CPU, **more)


@given(
    length=st.integers(1000, 200_000),
    heads=st.integers(1, 8),
    programs=st.integers(1, 140),
    rounds=st.sampled_from((64, 128)),
)
def test_launches_are_even_and_not_too_long(length, heads, programs, rounds):
    one = schedule(Pattern.parse((256, 512), (1, 2)), heads, length, programs=programs, rounds=rounds)
    assert one.items == len(one.costs())
    assert one.per_launch % programs == 0
    assert one.per_launch // programs <= rounds
    launches = -(-one.items // (rounds * programs))
    assert one.per_launch - programs < one.items / launches <= one.per_launch


def test_a_long_order_holds_every_item_once():
    """What a device does, on the CPU: several launches and a shorter last one."""
    one = schedule(Pattern.parse((256, 512), (1, 2)), 4, 128 * 256 + 77, programs=5, swept=64)
    assert one.items > one.per_launch, "one launch shows nothing"
    order, each = one.order(), one.per_launch
    assert order.dtype == torch.int32
    for number, part in enumerate(order.split(each)):
        assert sorted(part.tolist()) == list(range(number * each, number * each + len(part)))


@pytest.mark.parametrize("heads", [4, 16])
@pytest.mark.parametrize(("is_causal", "sweeps_later"), [(True, False), (True, True), (False, False)])
def test_work_is_level(is_causal, sweeps_later, heads):
    pattern = Pattern.parse((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16))
    costs = schedule(pattern, heads, 131072, is_causal=is_causal, sweeps_later=sweeps_later).costs()
    in_turn = torch.stack([costs[p::132].sum() for p in range(132)]).float()
    order = share_out(costs[None], 132)[0].long()
    shared = torch.stack([costs[order[p::132]].sum() for p in range(132)]).float()
    assert shared.max() / shared.mean() < 1.05
    assert shared.max() < in_turn.max()


@pytest.mark.parametrize(("is_causal", "sweeps_later"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("offset", [1000, 7777, 21845, 30000])
def test_work_is_nearly_level_where_offsets_are_not_known(is_causal, sweeps_later, offset):
    """Offsets of rows are on the device, and items are dealt out by the costs of 0: 12 % more than the mean at most."""
    pattern = Pattern.parse((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16))
    make = partial(schedule, pattern, 16, 131072, is_causal=is_causal, sweeps_later=sweeps_later)
    dealt, real = make(segment_offset=None), make(segment_offset=offset)
    tiles = dealt.items // dealt.copies
    # Items past the last token do nothing.
    costs = torch.zeros(dealt.copies, tiles)
    costs[:, : real.items // real.copies] = real.head_costs()
    order = dealt.order().long()
    work = torch.stack([costs.flatten()[order[program :: dealt.programs]].sum() for program in range(dealt.programs)])
    assert work.max() / work.mean() < 1.12


@pytest.mark.parametrize("length", [65536, 50000])
@pytest.mark.parametrize("offset", [0, 1024, -3000])
@pytest.mark.parametrize(("is_causal", "sweeps_later"), [(True, False), (True, True), (False, False)])
def test_costs_are_the_blocks_met(is_causal, sweeps_later, offset, length):
    pattern = Pattern.parse((1024, 4096, 16384), (1, 2, 8))
    one = schedule(pattern, 8, length, swept=64, is_causal=is_causal, sweeps_later=sweeps_later, segment_offset=offset)
    nest, before = one.nest, offset % 16384
    tiles = len(one.head_costs()) // -(-(length + before % 1024) // 1024)
    costs = one.head_costs().view(-1, tiles)
    # The first segment has rows of the grid that no token stands on, which the costs count roughly.
    for segment in (*([0] if before % 1024 == 0 else []), 1, 5, 17, len(costs) - 1):
        start = segment * 1024 + before // 1024 * 1024
        tile = 0
        for row_class in nest.classes:
            count = -(-1024 // (row_class.step * 128))
            for _ in range(row_class.residues):
                for block in range(count):
                    first, last = block * 128 * row_class.step, (block + 1) * 128 * row_class.step
                    expected = 0
                    tokens = range(before, before + length)
                    if start + first < tokens.stop:
                        expected = 1 + met(nest, row_class.level, start, first, last, tokens, is_causal, sweeps_later)
                    assert costs[segment, tile] == expected, (segment, tile)
                    tile += 1


def met(nest, level, start, first, last, tokens, is_causal, sweeps_later):
    """Blocks of 64 rows, range by range, that the rows [first, last) of the segment from ``start`` on meet.

    ``tokens`` are the places of the grid that a token stands on.
    """
    blocks = 0
    for index in range(level):
        width, rate = nest.segment_lengths[index], nest.dilation_rates[index]
        low = start // width * width
        positions = [p for p in range(low, low + width, rate) if p in tokens]
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


@given(
    length=st.integers(600, 3000),
    heads=st.integers(1, 8),
    head_offsets=st.sampled_from(["blocked", "interleaved"]),
    branches=st.sampled_from([((512, 1), (1024, 4)), ((600, 2),), ((700, 8),), ((5000, 8),)]),
)
def test_items_that_are_left_out_have_no_wanted_row(length, heads, head_offsets, branches):
    lengths, rates = zip(*branches, strict=True)
    (nest,) = make_nests(Pattern.parse(lengths, rates, head_offsets), heads, 64, 64)
    needed = needed_by_first(Pattern.parse((200, 600, 5000), (1, 4, 8), head_offsets), heads, length)
    owned = 32
    tiles, shape = kernel_arguments(nest, nest.classes, min(lengths[0], length), owned)
    one = Schedule(nest, shape, length, heads, 5, 128, owned, 32, False, False, CPU, needed, heads, head_offsets)
    kept = {item for item in one.order().tolist() if item >= 0}
    rows = {n for w, r in needed.runs for n in range(0, min(w, length), r)}
    segments = -(-length // lengths[0])
    for item in range(one.items):
        tile, segment, head = item % tiles, item // tiles % segments, item // tiles // segments
        number = max(i for i, first in enumerate(shape[5]) if tile >= first)
        c, t = divmod(tile - shape[5][number], shape[6][number])
        step, inner = shape[4][number], shape[3][number]
        start = segment * lengths[0]
        begin = start + (head_offset(head_offsets, head, heads, step) + (1 + c) * inner) % step + t * owned * step
        end = min(start + lengths[0], length)
        mine = set(range(begin, min(end, begin + owned * step), step))
        assert item in kept or not mine & rows, item
        if begin >= max(w for w, _ in needed.runs):
            assert item not in kept
