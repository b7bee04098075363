"""Nests against the definition of the selection, by brute force."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import multiplicity

from longnet.geometry import Pattern
from longnet.geometry.nests import Nest, make_nests
from longnet.geometry.pattern import PAPER_OFFSETS


@st.composite
def patterns(draw: st.DrawFn):
    """(pattern, heads, length, unit, least rows): half of the patterns grow by factors, as nests need it."""
    heads, branches = draw(st.integers(1, 6)), []
    if draw(st.booleans()):
        width, rate = draw(st.sampled_from([4, 8, 12])), draw(st.sampled_from([1, 1, 2]))
        for _ in range(draw(st.integers(1, 4))):
            branches.append((width, rate))
            width, rate = width * draw(st.integers(1, 2)), rate * draw(st.sampled_from([1, 2, 2, 4]))
        branches = [(width, min(width, rate)) for width, rate in draw(st.permutations(branches))]
    else:
        for _ in range(draw(st.integers(1, 3))):
            width = draw(st.integers(1, 20))
            branches.append((width, draw(st.integers(1, min(6, width)))))
    pattern = Pattern.parse([w for w, _ in branches], [r for _, r in branches], draw(st.sampled_from(PAPER_OFFSETS)))
    return pattern, heads, draw(st.integers(1, 40)), draw(st.sampled_from([1, 4, 16])), draw(st.sampled_from([1, 3]))


def level(pattern: Pattern, nest: Nest, head: int, heads: int, position: int) -> int:
    return sum(pattern.selects(branch, head, heads, position) for branch in nest.branches)


@given(patterns())
@settings(max_examples=200, deadline=None)
def test_nests_share_out_the_branches(case):
    pattern, heads, _, unit, least_rows = case
    nests = make_nests(pattern, heads, unit, least_rows)
    assert Counter(b for nest in nests for b in nest.branches) == Counter(pattern.branches)
    covering = [nest.covers_all for nest in nests]
    assert covering == sorted(covering, reverse=True)
    for nest in nests:
        assert nest.covers_all == (1 in nest.dilation_rates)
        if len(nest.branches) > 1:
            assert all(unit % rate == 0 for rate in nest.dilation_rates)
            assert all(nest.segment_lengths[0] // rate >= least_rows for rate in nest.dilation_rates[1:])


@given(patterns())
@settings(max_examples=200, deadline=None)
def test_classes_are_the_rows_of_the_finest_branch_by_level(case):
    pattern, heads, length, unit, least_rows = case
    for nest in make_nests(pattern, heads, unit, least_rows):
        finest = nest.branches[0]
        for head in range(heads):
            seen: dict[int, int] = {}
            for start in range(0, length, finest.segment_length):
                end = min(length, start + finest.segment_length)
                for c in nest.classes:
                    offset = pattern.offset(nest.branches[c.level - 1], head, heads)
                    if c.level < len(nest.branches):
                        offset = pattern.offset(nest.branches[c.level], head, heads)
                    for residue in range(1, c.residues + 1):
                        for row in range(start + (offset + residue * c.inner) % c.step, end, c.step):
                            assert row not in seen
                            seen[row] = c.level
            rows = [p for p in range(length) if pattern.selects(finest, head, heads, p)]
            assert seen == {row: level(pattern, nest, head, heads, row) for row in rows}


@given(patterns())
@settings(max_examples=100, deadline=None)
def test_weights_of_visited_keys_are_the_multiplicities(case):
    """A key of branch i outside the finer segment weighs min(level of the query, level of the key) - i."""
    pattern, heads, length, unit, least_rows = case
    expected = multiplicity(pattern.segment_lengths, pattern.dilation_rates, heads, length, False, pattern.head_offsets)
    for head in range(heads):
        weights: Counter[tuple[int, int]] = Counter()
        for nest in make_nests(pattern, heads, unit, least_rows):
            levels = [level(pattern, nest, head, heads, p) for p in range(length)]
            for query in range(length):
                for i, branch in enumerate(nest.branches[: levels[query]]):
                    finer = nest.segment_lengths[i - 1] if i else None
                    start = query // branch.segment_length * branch.segment_length
                    for key in range(start, min(length, start + branch.segment_length)):
                        outside = finer is None or key // finer != query // finer
                        if outside and pattern.selects(branch, head, heads, key):
                            weights[query, key] += min(levels[query], levels[key]) - i
        found = [[weights[query, key] for key in range(length)] for query in range(length)]
        assert found == expected[head].tolist()


def test_the_papers_series_is_one_nest():
    pattern = Pattern.parse((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16))
    (nest,) = make_nests(pattern, 16, 64, 64)
    assert nest.branches == pattern.branches
    assert [(c.level, c.inner, c.step, c.residues) for c in nest.classes] == [
        *((1, 1, 2, 1), (2, 2, 4, 1), (3, 4, 8, 1), (4, 8, 16, 1), (5, 16, 16, 1)),
    ]


@pytest.mark.parametrize(
    ("segment_lengths", "dilation_rates", "heads", "unit", "least_rows", "head_offsets"),
    [
        ((8, 12), (1, 2), 4, 16, 1, "interleaved"),  # lengths do not divide
        ((12, 24), (2, 3), 4, 12, 1, "interleaved"),  # rates do not divide
        ((8, 16), (1, 3), 4, 12, 1, "interleaved"),  # the finer segment is not whole periods of the rate
        ((8, 16), (1, 4), 4, 2, 1, "interleaved"),  # the rate divides no block
        ((8, 16), (1, 4), 4, 16, 3, "interleaved"),  # two rows of a segment are too few
        ((8, 16), (2, 4), 4, 16, 1, "blocked"),  # heads 1 and 2 have other offsets
    ],
)
def test_what_does_not_nest_stays_apart(segment_lengths, dilation_rates, heads, unit, least_rows, head_offsets):
    pattern = Pattern.parse(segment_lengths, dilation_rates, head_offsets)
    assert len(make_nests(pattern, heads, unit, least_rows)) == 2


def test_plans_are_shared():
    pattern = Pattern.parse((8, 16), (1, 2))
    assert make_nests(pattern, 4, 16, 1) is make_nests(Pattern.parse((8, 16), (1, 2)), 4, 16, 1)
