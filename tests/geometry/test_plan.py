"""The plan's tiles against the definition of the selection."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longnet.attention.backends.views import padding_view, tile_view
from longnet.geometry import Pattern, make_plan
from longnet.geometry.pattern import PAPER_OFFSETS


@st.composite
def plans(draw: st.DrawFn):
    heads = draw(st.integers(1, 9))
    first = draw(st.integers(0, heads - 1))
    last = draw(st.integers(first + 1, heads))
    width = draw(st.integers(1, 20))
    rate = draw(st.integers(1, width))
    pattern = Pattern.parse(width, rate, draw(st.sampled_from(PAPER_OFFSETS)))
    return pattern, heads, draw(st.integers(0, 45)), first, last


@given(plans())
@settings(max_examples=300, deadline=None)
def test_tiles_hold_every_selected_row_once_and_nothing_else(case):
    pattern, heads, length, first, last = case
    branch = pattern.branches[0]
    seen: dict[tuple[int, int], list[int]] = {}
    for planned in make_plan(pattern, heads, length, first, last).branches:
        for tile in planned.tiles:
            assert min(tile.shape) > 0
            for head, _, positions in tile.positions():
                for position in positions:
                    assert (head + first, position) not in seen
                    seen[head + first, position] = positions
    for head in range(first, last):
        for position in range(length):
            keys = [
                p
                for p in range(length)
                if p // branch.segment_length == position // branch.segment_length
                and pattern.selects(branch, head, heads, p)
            ]
            if pattern.selects(branch, head, heads, position):
                assert seen.pop((head, position)) == keys
    assert not seen


@given(plans(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_tile_views_read_the_rows_the_tile_names(case, tokens_first):
    pattern, heads, length, first, last = case
    shape = (2, length, last - first, 3) if tokens_first else (2, last - first, length, 3)
    x = torch.randn(shape)
    x = x.transpose(1, 2) if tokens_first else x
    mask = torch.rand(2, length) < 0.5
    for planned in make_plan(pattern, heads, length, first, last).branches:
        for tile in planned.tiles:
            view = tile_view(x, tile)
            assert view.shape == (2, *tile.shape, 3)
            assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
            padded = padding_view(mask, tile).expand(2, *tile.shape)
            for s in range(tile.segments):
                for c in range(tile.offsets):
                    for i in range(tile.heads):
                        start = tile.start + s * tile.segment_step + c
                        rows = torch.arange(tile.rows) * tile.row_step + start
                        head = tile.head + c * tile.head_step_per_offset + i * tile.head_step
                        assert torch.equal(view[:, s, c, i], x[:, head, rows])
                        assert torch.equal(padded[:, s, c, i], mask[:, rows])


def test_a_block_of_heads_is_that_part_of_the_whole_plan():
    pattern = Pattern.parse((8, 16), (2, 4))
    whole = make_plan(pattern, 12, 40)
    part = make_plan(pattern, 12, 40, 5, 9)

    def rows(plan, first):
        return {
            (number, head + first, tuple(positions))
            for number, planned in enumerate(plan.branches)
            for tile in planned.tiles
            for head, _, positions in tile.positions()
        }

    assert rows(part, 5) == {row for row in rows(whole, 0) if 5 <= row[1] < 9}


def test_the_covering_branch_comes_first():
    plan = make_plan(Pattern.parse((8, 16, 32), (2, 4, 1)), 4, 64)
    assert [planned.covers_all for planned in plan.branches] == [True, False, False]


def test_a_billion_tokens_plan_at_once_and_plans_are_shared():
    pattern = Pattern.parse(tuple(2048 * 4**i for i in range(10)), tuple(4**i for i in range(10)))
    plan = make_plan(pattern, 16, 10**9 + 7)
    assert plan is make_plan(pattern, 16, 10**9 + 7)
    assert sum(len(planned.tiles) for planned in plan.branches) < 100


@pytest.mark.parametrize("length", [0, 1])
def test_tiny_lengths(length):
    plan = make_plan(Pattern.parse((4, 8), (1, 3)), 2, length)
    rows = [row for planned in plan.branches for tile in planned.tiles for row in tile.positions()]
    assert len(rows) == (2 + 1 if length else 0)
