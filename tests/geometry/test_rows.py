"""The rows of a branch, and a chunk's own parts, against the definition, position by position."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longnet.attention.backends.views import bias_columns
from longnet.geometry import Branch, Pattern
from longnet.geometry.chunks import own_parts, windows
from longnet.geometry.pattern import PAPER_OFFSETS
from longnet.geometry.rows import locate
from longnet.geometry.shards import Shards, shared_rows

Pair = tuple[int, int]


def _selects(branch: Branch, offset: int, position: int) -> bool:
    return (position % branch.segment_length) % branch.dilation_rate == offset


@st.composite
def branches(draw: st.DrawFn) -> Branch:
    width = draw(st.integers(1, 20))
    return Branch(width, draw(st.integers(1, width)))


@st.composite
def patterns(draw: st.DrawFn) -> Pattern:
    found = draw(st.lists(branches(), min_size=1, max_size=3))
    lengths, rates = zip(*((one.segment_length, one.dilation_rate) for one in found), strict=True)
    return Pattern.parse(lengths, rates, draw(st.sampled_from(PAPER_OFFSETS)))


@given(branches(), st.integers(0, 60))
def test_a_position_lies_in_the_segment_that_its_number_says(branch: Branch, position: int) -> None:
    number = position // branch.segment_length
    start = number * branch.segment_length
    assert branch.segment_number(position) == number
    assert (branch.segment_start(position), branch.segment_stop(position)) == (start, start + branch.segment_length)
    assert branch.is_aligned(position) == _selects(branch, 0, position)
    assert branch.segment_start(torch.tensor([position, start])).tolist() == [start, start]


@given(branches(), st.integers(0, 60), st.data())
def test_a_range_of_a_segment_holds_the_rows_that_the_offset_selects(branch: Branch, start: int, data) -> None:
    segment = start // branch.segment_length * branch.segment_length
    stop = data.draw(st.integers(start, segment + branch.segment_length))
    offset = data.draw(st.integers(0, branch.dilation_rate - 1))
    in_segment = [p for p in range(segment, segment + branch.segment_length) if _selects(branch, offset, p)]
    rows = branch.selected(start, stop, offset)
    assert list(rows.positions) == [p for p in in_segment if start <= p < stop]
    assert rows.number == sum(p < start for p in in_segment)
    assert torch.arange(start, stop)[rows.tokens(start)].tolist() == list(rows.positions)
    assert branch.rows(stop - segment, offset) == sum(p < stop for p in in_segment)
    positions = torch.arange(segment, stop)
    assert positions[branch.selects(positions, offset)].tolist() == [p for p in in_segment if p < stop]


@given(branches(), st.integers(0, 60))
def test_segments_follow_one_another(branch: Branch, length: int) -> None:
    starts = sorted({p // branch.segment_length * branch.segment_length for p in range(length)})
    assert list(branch.starts(length)) == starts
    sizes = [min(start + branch.segment_length, length) - start for start in starts]
    spans = [(first + i * size, size) for first, count, size in branch.spans(length) for i in range(count)]
    assert spans == list(zip(starts, sizes, strict=True))
    assert branch.longest(length) == max(sizes, default=0)


@given(branches(), st.integers(0, 60))
def test_a_position_is_the_row_that_locate_says(branch: Branch, position: int) -> None:
    offset, number, first = locate(position, branch.segment_length, branch.dilation_rate)
    assert _selects(branch, offset, position) and first == branch.segment_start(position) + offset
    assert first + number * branch.dilation_rate == position


@given(branches(), st.integers(0, 60), st.integers(0, 60))
def test_tokens_are_a_sequence_of_their_own_where_its_rows_are_the_same(branch, start: int, length: int) -> None:
    def pairs(first: int) -> set[Pair]:
        same = branch.segment_number
        every = range(branch.dilation_rate)
        return {
            (p - first, offset) for p in range(first, first + length) for offset in every if _selects(branch, offset, p)
        } | {(p - first, -1) for p in range(first + 1, first + length) if same(p) != same(p - 1)}

    same = pairs(start) == pairs(0)
    assert branch.is_own_sequence(start, length) <= same
    # A cut between rows whose offsets go on may look the same for a few tokens.
    if length > branch.segment_length:
        assert branch.is_own_sequence(start, length) == same
    assert branch.is_own_sequence(start, None) == (start % branch.segment_length == 0)


@given(patterns(), st.integers(1, 4), st.integers(0, 50), st.integers(1, 50))
@settings(max_examples=200, deadline=None)
def test_a_chunks_own_parts_are_its_pairs_each_once(pattern: Pattern, heads: int, start: int, length: int) -> None:
    stop = start + length
    expected = sorted(
        (number, head, q, k)
        for number, branch in enumerate(pattern.branches)
        for head in range(heads)
        for q in range(start, stop)
        for k in range(start, stop)
        if q // branch.segment_length == k // branch.segment_length
        and pattern.selects(branch, head, heads, q)
        and pattern.selects(branch, head, heads, k)
    )
    found = []
    parts, unaligned = own_parts(pattern, start, length)
    numbers = {
        branch: [i for i, other in enumerate(pattern.branches) if other == branch] for branch in pattern.branches
    }
    for part in parts:
        for branch in dict.fromkeys(part.pattern.branches):
            # Of a sequence that begins with the part.
            rows = [
                (head, p, p // branch.segment_length)
                for head in range(heads)
                for p in range(part.last - part.first)
                if pattern.selects(branch, head, heads, p)
            ]
            base = start + part.first
            found += [
                (i, head, base + q, base + k)
                for i in numbers[branch]
                for head, q, one in rows
                for other_head, k, other in rows
                if head == other_head and one == other
            ]
    for branch in dict.fromkeys(unaligned):
        for head in range(heads):
            rows = branch.selected(start, min(branch.segment_stop(start), stop), pattern.offset(branch, head, heads))
            found += [(i, head, q, k) for i in numbers[branch] for q in rows.positions for k in rows.positions]
    assert sorted(found) == expected


@given(patterns(), st.integers(0, 100), st.integers(1, 60), st.integers(1, 100))
def test_no_key_is_read_across_a_window(pattern: Pattern, position: int, length: int, most: int) -> None:
    start = pattern.window_start(position)
    assert 0 <= start <= position < start + pattern.period
    parts = windows(pattern, length, most)
    assert [p for part in parts for p in range(length)[part.tokens]] == list(range(length))
    for part in parts:
        assert part.last - part.first <= max(most, pattern.period) and part.pattern == pattern
        assert all(part.first % branch.segment_length == 0 for branch in pattern.branches)
    same = all(position // b.segment_length == length // b.segment_length for b in pattern.branches)
    assert pattern.same_segments(position, length) == same
    assert pattern.span(length) == max(min(b.segment_length, length) for b in pattern.branches)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(-40, 40))
def test_the_columns_of_a_bias_are_the_distances_of_any_two_rows(
    queries: int, keys: int, step: int, between: int
) -> None:
    pairs = {between + k * step - q * step for q in range(queries) for k in range(keys)}
    bias = torch.arange(-100, 101)
    assert bias[bias_columns(bias, queries, keys, step, between)].tolist() == sorted(pairs)


@given(
    patterns(),
    st.integers(1, 3),
    st.integers(1, 2),
    st.lists(st.integers(0, 20), min_size=2, max_size=4),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_shards_share_the_pairs_that_cross_their_borders(pattern, kv_heads, group, lengths, is_causal) -> None:
    shards, heads = Shards(tuple(lengths)), kv_heads * group
    ranks = range(len(lengths))
    owner_of = [rank for rank in ranks for _ in range(lengths[rank])]
    expected = sorted(
        (number, head, q, k)
        for number, branch in enumerate(pattern.branches)
        for head in range(heads)
        for q in range(shards.total)
        for k in range(q if is_causal else shards.total)
        if owner_of[q] != owner_of[k]
        and q // branch.segment_length == k // branch.segment_length
        and pattern.selects(branch, head, heads, q)
        and pattern.selects(branch, head, heads, k)
    )
    found = []
    for owner in ranks:
        for receiver in ranks:
            for one in shared_rows(pattern, heads, kv_heads, shards, owner, receiver, is_causal):
                assert one.before == (owner < receiver) and {head // group for head in one.heads} == {one.kv_head}
                assert {owner_of[k] for k in one.keys.positions} == {owner}
                pairs = [(q, k) for q in one.queries.positions for k in one.keys.positions]
                found += [(one.branch, head, *pair) for head in one.heads for pair in pairs]
    assert sorted(found) == expected
