from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from longnet.geometry.coverage import uncovered_positions
from longnet.geometry.reach import offsets_taken
from longnet.geometry.suggest import suggest_pattern


@settings(max_examples=300, deadline=None)
@given(
    max_length=st.integers(1, 10**10),
    budget=st.integers(1, 10**6),
    heads=st.none() | st.integers(1, 40),
    ratio=st.integers(2, 5),
    head_offsets=st.sampled_from(["interleaved", "blocked"]),
)
def test_every_suggestion_keeps_its_promises(max_length, budget, heads, ratio, head_offsets) -> None:
    try:
        pattern = suggest_pattern(max_length, budget, heads=heads, ratio=ratio, head_offsets=head_offsets)
    except ValueError as error:
        least = int(str(error).split("at least ")[1].split(",")[0])
        assert least > budget
        assume(least <= 10**9)
        again = suggest_pattern(max_length, least, heads=heads, ratio=ratio, head_offsets=head_offsets)
        assert sum(b.segment_length // b.dilation_rate for b in again.branches) == least
        if least > 1:
            with pytest.raises(ValueError, match="too small"):
                suggest_pattern(max_length, least - 1, heads=heads, ratio=ratio, head_offsets=head_offsets)
        return
    branches = pattern.branches
    assert branches[0].dilation_rate == 1
    assert branches[-1].segment_length >= max_length
    assert all(branch.segment_length % branch.dilation_rate == 0 for branch in branches)
    assert all(after.segment_length == ratio * before.segment_length for before, after in pairwise(branches))
    assert all(after.dilation_rate >= before.dilation_rate for before, after in pairwise(branches))
    assert all(branch.segment_length < max_length for branch in branches[:-1])
    assert sum(branch.segment_length // branch.dilation_rate for branch in branches) <= budget
    assert pattern.head_offsets == head_offsets
    assert not uncovered_positions(pattern, heads or 1, max_length)
    if heads is not None:
        assert all(len(offsets_taken(pattern, branch, heads)) == branch.dilation_rate for branch in branches)


def test_the_papers_lengths_come_out_of_their_own_budget() -> None:
    pattern = suggest_pattern(32768, 5 * 2048)
    assert pattern.segment_lengths == (2048, 4096, 8192, 16384, 32768)
    assert pattern.dilation_rates == (1, 2, 4, 8, 16)


def test_a_large_budget_is_dense_and_a_small_one_says_what_it_needs() -> None:
    assert suggest_pattern(1000, 1000).branches == suggest_pattern(1000, 10**6).branches
    assert suggest_pattern(1000, 1000).segment_lengths == (1000,)
    with pytest.raises(ValueError, match=r"budget=4096 .* max_length=1000000000 .* heads=12 fill: .* at least \d+"):
        suggest_pattern(10**9, 4096, heads=12)
    assert suggest_pattern(10**9, 4096).segment_lengths[-1] >= 10**9


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"max_length": 0}, ValueError, "max_length=0"),
        ({"budget": 0.5}, TypeError, "budget=0.5"),
        ({"heads": 0}, ValueError, "heads=0"),
        ({"ratio": 1}, ValueError, "ratio=1"),
        ({"head_offsets": "odd", "heads": 4}, ValueError, "head_offsets='odd'"),
    ],
)
def test_bad_numbers_are_named(change: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        suggest_pattern(**{"max_length": 100, "budget": 50} | change)
