"""Rows whose results are read: limits that leave none of them out."""

from __future__ import annotations

from math import lcm

from hypothesis import given
from hypothesis import strategies as st

from longnet.geometry import Pattern
from longnet.geometry.needed_rows import needed_by_first, swept_limits
from longnet.geometry.nests import make_nests

BRANCHES = st.sampled_from(
    [
        ((16, 1), (64, 4)),
        ((1024, 1), (5792, 2), (32768, 4), (185363, 8), (1048576, 16)),
        ((32, 1), (50, 3), (200, 8)),
        ((10, 4), (21, 6)),
    ]
)


def read(pattern: Pattern, length: int) -> set[int]:
    """By the definition: what the first token sees in a branch that some head's offset lets select it; head 0's always does."""
    return {n for b in pattern.branches for n in range(0, min(b.segment_length, length), b.dilation_rate)}


@given(branches=BRANCHES, first=st.integers(0, 300), step=st.integers(1, 24), length=st.integers(1, 400))
def test_no_row_past_a_limit_is_wanted_and_one_shortly_before_it_is(branches, first, step, length):
    pattern = Pattern.parse(*zip(*branches, strict=True), "blocked")
    limit = needed_by_first(pattern, 4, length).limit(first, step)
    needed = set(range(first, length, step)) & read(pattern, length)
    assert all(n < limit for n in needed)
    # Of two progressions the common rows lie a common multiple apart.
    apart = max(lcm(step, rate) for _, rate in branches)
    assert needed or limit - apart <= first
    assert not needed or max(needed) >= limit - apart


@given(
    branches=BRANCHES,
    length=st.integers(1, 700),
    heads=st.integers(1, 8),
    head_offsets=st.sampled_from(["blocked", "interleaved"]),
)
def test_what_branches_select_past_their_limits_is_not_wanted(branches, length, heads, head_offsets):
    lengths, rates = zip(*branches, strict=True)
    pattern = Pattern.parse(lengths, rates, head_offsets)
    needed = read(pattern, length)
    for nest in make_nests(pattern, heads, 64, 1):
        limits = swept_limits(nest, needed_by_first(pattern, heads, length), head_offsets, heads, length)
        for head, row in enumerate(limits):
            for branch, limit in zip(nest.branches, row, strict=True):
                assert 0 <= limit <= length
                selected = {n for n in range(length) if pattern.selects(branch, head, heads, n)}
                assert not {n for n in selected if n >= limit} & needed
