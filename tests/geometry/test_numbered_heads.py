"""Patterns of some heads by number: offsets, tiles, coverage, cost and shards are those of these heads among all."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longnet.geometry import (
    HeadNumbers,
    Pattern,
    coverage,
    keys_per_query,
    make_plan,
    receptive_field,
    score_pairs,
    uncovered_positions,
)
from longnet.geometry.pattern import PAPER_OFFSETS
from longnet.geometry.shards import Shards, shared_rows


@st.composite
def patterns(draw: st.DrawFn) -> tuple[Pattern, Pattern, tuple[int, ...], int]:
    """(of all heads, of some, their numbers, how many there are in all)."""
    total = draw(st.integers(1, 10))
    numbers = tuple(sorted(draw(st.sets(st.integers(0, total - 1), min_size=1))))
    widths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    rates = [draw(st.integers(1, width)) for width in widths]
    offsets = draw(st.sampled_from(PAPER_OFFSETS))
    return Pattern.parse(widths, rates, offsets), Pattern.parse(widths, rates, offsets, numbers, total), numbers, total


@given(patterns())
@settings(max_examples=200, deadline=None)
def test_heads_keep_the_offsets_of_their_numbers(case) -> None:
    whole, some, numbers, total = case
    for branch in whole.branches:
        for head, number in enumerate(numbers):
            assert some.offset(branch, head, len(numbers)) == whole.offset(branch, number, total)


@given(patterns(), st.integers(0, 45), st.data())
@settings(max_examples=300, deadline=None)
def test_tiles_hold_what_these_heads_select(case, length, data) -> None:
    whole, some, numbers, total = case
    first = data.draw(st.integers(0, len(numbers) - 1))
    last = data.draw(st.integers(first + 1, len(numbers)))
    plan = make_plan(some, len(numbers), length, first, last)
    full = make_plan(whole, total, length)

    def rows(plan, name):
        return sorted(
            (branch.branch.segment_length, branch.branch.dilation_rate, name(head), tuple(positions))
            for branch in plan.branches
            for tile in branch.tiles
            for head, _, positions in tile.positions()
        )

    wanted = numbers[first:last]
    assert rows(plan, lambda head: numbers[head + first]) == [
        row for row in rows(full, lambda head: head) if row[2] in wanted
    ]
    # Views of tensors have no negative steps.
    tiles = [tile for branch in plan.branches for tile in branch.tiles]
    assert all(tile.head_step > 0 and tile.head_step_per_offset > 0 for tile in tiles)


@pytest.mark.parametrize("head_offsets", PAPER_OFFSETS)
def test_a_branch_that_selects_all_is_one_rectangle(head_offsets) -> None:
    """Whatever heads are missing: at rate 1 all have one offset."""
    pattern = Pattern.parse((8, 16), (1, 4), head_offsets, (0, 1, 4, 6, 9, 10), 12)
    plan = make_plan(pattern, 6, 64)
    assert len(plan.branches[0].tiles) == 1


@given(patterns(), st.integers(1, 60), st.booleans())
@settings(max_examples=150, deadline=None)
def test_coverage_and_cost_count_these_heads(case, length, is_causal) -> None:
    whole, some, numbers, total = case
    heads = len(numbers)
    covered = {
        p
        for p in range(length)
        for branch in whole.branches
        if any(whole.selects(branch, n, total, p) for n in numbers)
    }
    assert uncovered_positions(some, heads, length).count == length - len(covered)
    each = coverage(whole, total, length).heads
    assert coverage(some, heads, length).heads == tuple(each[number] for number in numbers)
    pairs = 0
    for number in numbers:
        for branch in whole.branches:
            for p in range(length):
                if whole.selects(branch, number, total, p):
                    start = p // branch.segment_length * branch.segment_length
                    end = p + 1 if is_causal else min(start + branch.segment_length, length)
                    pairs += sum(whole.selects(branch, number, total, k) for k in range(start, end))
    assert score_pairs(some, heads, length, is_causal) == pairs
    assert keys_per_query(some, heads, length, is_causal).mean * heads * length == pairs


@given(patterns(), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_a_layer_reaches_what_one_of_these_heads_reads(case, length) -> None:
    whole, some, numbers, total = case
    position = length - 1
    reached = {position}
    for branch in whole.branches:
        start = position // branch.segment_length * branch.segment_length
        for n in numbers:
            if whole.selects(branch, n, total, position):
                reached |= {p for p in range(start, position + 1) if whole.selects(branch, n, total, p)}
    assert receptive_field(some, len(numbers), length, 1, is_causal=True)[0].tokens == len(reached)


def test_shards_send_the_rows_of_these_heads() -> None:
    whole = Pattern.parse((64,), (4,))
    some = Pattern.parse((64,), (4,), "interleaved", (1, 3, 6), 8)
    shards = Shards((32, 32))
    sent = {(x.kv_head, x.keys) for x in shared_rows(some, 3, 3, shards, 0, 1, True)}
    among_all = shared_rows(whole, 8, 8, shards, 0, 1, True)
    assert sent == {((1, 3, 6).index(x.kv_head), x.keys) for x in among_all if x.kv_head in (1, 3, 6)}


def test_what_is_left_uncovered_is_said() -> None:
    found = uncovered_positions(Pattern.parse(16, 8, "interleaved", (0, 3), 8), 2)
    assert found.fraction == 6 / 8 and "p mod 8 not in {0, 3}" in found.description


@pytest.mark.parametrize("numbers", [(), (0, 0), (1, 0), (-1, 2), (2, 4)])
def test_numbers_that_are_none_of_the_heads_are_refused(numbers) -> None:
    with pytest.raises(ValueError, match=r"head_numbers=\(.*\): expected at least one of the heads 0 to 3, each once"):
        Pattern.parse(8, 2, "interleaved", numbers, 4)


def test_numbers_are_ints() -> None:
    with pytest.raises(TypeError, match="head_numbers"):
        HeadNumbers.parse([0, 1.0], 4)  # type: ignore[list-item]


def test_a_pattern_of_some_heads_is_of_so_many() -> None:
    pattern = Pattern.parse(8, 2, "interleaved", (0, 2), 4)
    with pytest.raises(ValueError, match=r"heads=4: expected the 2 of head_numbers=\(0, 2\)"):
        make_plan(pattern, 4, 8)


def test_key_value_heads_go_whole() -> None:
    assert HeadNumbers.parse((2, 3, 6, 7), 8).kv_heads(4) == 2
    assert HeadNumbers.parse((0, 5), 8).kv_heads(8) == 2
    with pytest.raises(ValueError, match="expected all 2 heads of a key/value head, or none"):
        HeadNumbers.parse((1, 2), 8).kv_heads(4)
