"""Rows whose results are read: limits that leave none of them out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from longnet.geometry import Pattern
from longnet.geometry.nests import make_nests
from longnet.geometry.wanted import read_by_first, swept_limits

BRANCHES = st.sampled_from(
    [
        ((16, 1), (64, 4)),
        ((1024, 1), (5792, 2), (32768, 4), (185363, 8), (1048576, 16)),
        ((32, 1), (50, 3), (200, 8)),
        ((10, 4), (21, 6)),
    ]
)


def read(pattern: Pattern, length: int) -> set[int]:
    return {n for w, r in read_by_first(pattern).runs for n in range(0, min(w, length), r)}


@given(branches=BRANCHES, first=st.integers(0, 300), step=st.integers(1, 24), length=st.integers(1, 400))
def test_no_row_past_a_limit_is_wanted_and_some_just_before_may_be(branches, first, step, length):
    pattern = Pattern(tuple(Pattern.parse(w, r).branches[0] for w, r in branches), "blocked")
    limit = read_by_first(pattern).limit(first, step)
    assert not {n for n in range(first, length, step) if n >= limit} & read(pattern, length)
    if limit == 0:
        assert not set(range(first, length, step)) & read(pattern, length)


@given(
    branches=BRANCHES,
    length=st.integers(1, 700),
    heads=st.integers(1, 8),
    head_offsets=st.sampled_from(["blocked", "interleaved"]),
)
def test_what_branches_select_past_their_limits_is_not_wanted(branches, length, heads, head_offsets):
    lengths, rates = zip(*branches, strict=True)
    pattern = Pattern.parse(lengths, rates, head_offsets)
    wanted = read(pattern, length)
    for nest in make_nests(pattern, heads, 64, 1):
        limits = swept_limits(nest, read_by_first(pattern), head_offsets, heads, length)
        for head, row in enumerate(limits):
            for branch, limit in zip(nest.branches, row, strict=True):
                assert 0 <= limit <= length
                selected = {n for n in range(length) if pattern.selects(branch, head, heads, n)}
                assert not {n for n in selected if n >= limit} & wanted
