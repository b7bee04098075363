from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longnet.geometry.pattern import Branch, Pattern


def test_one_branch_may_be_two_ints_and_equal_patterns_hash_alike() -> None:
    assert Pattern.parse(8, 2) == Pattern.parse([8], (2,))
    assert hash(Pattern.parse(8, 2)) == hash(Pattern.parse([8], [2]))
    assert Pattern.parse(8, 2) != Pattern.parse(8, 2, "blocked")


@pytest.mark.parametrize(
    ("segments", "rates", "head_offsets", "error", "words"),
    [
        (
            (2048, 4096),
            (1,),
            "interleaved",
            ValueError,
            r"\(2048, 4096\) and dilation_rates=\(1,\) differ",
        ),
        ((), (), "interleaved", ValueError, "at least one branch"),
        ((4, 0), (1, 1), "interleaved", ValueError, r"segment_lengths=\(4, 0\) holds 0"),
        (4, -1, "interleaved", ValueError, r"dilation_rates=\(-1,\) holds -1"),
        (4, 5, "interleaved", ValueError, r"holds 5, more than its segment length 4"),
        (4, 2, "random", ValueError, "head_offsets='random'"),
        ((4, 2.0), (1, 1), "interleaved", TypeError, "2.0 of type float"),
        (4, True, "interleaved", TypeError, "True of type bool"),
        (None, 1, "interleaved", TypeError, "segment_lengths=None"),
    ],
)
def test_what_a_user_gets_wrong_is_named(segments, rates, head_offsets, error, words) -> None:
    with pytest.raises(error, match=words):
        Pattern.parse(segments, rates, head_offsets)


def test_interleaved_offsets_go_round_and_blocked_ones_come_in_blocks() -> None:
    branch = Branch(16, 4)
    interleaved, blocked = Pattern((branch,)), Pattern((branch,), "blocked")
    assert [interleaved.offset(branch, head, 8) for head in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [blocked.offset(branch, head, 8) for head in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_blocked_offsets_of_12_heads_at_rate_8_miss_6_and_7() -> None:
    branch = Branch(16, 8)
    assert {Pattern((branch,), "blocked").offset(branch, head, 12) for head in range(12)} == set(range(6))


def test_a_segment_that_is_no_multiple_of_its_rate_restarts_the_count() -> None:
    branch = Branch(5, 2)
    pattern = Pattern((branch,))
    assert [p for p in range(12) if pattern.selects(branch, 1, 2, p)] == [1, 3, 6, 8, 11]


@given(
    length=st.integers(1, 20),
    rate=st.integers(1, 20),
    head=st.integers(0, 7),
    heads=st.integers(1, 8),
    head_offsets=st.sampled_from(["interleaved", "blocked"]),
    size=st.integers(0, 20),
)
def test_rows_counts_what_selects_selects(length, rate, head, heads, head_offsets, size) -> None:
    branch = Branch(max(length, rate), rate)
    pattern = Pattern((branch,), head_offsets)
    head, size = head % heads, min(size, branch.segment_length)
    offset = pattern.offset(branch, head, heads)
    assert 0 <= offset < rate
    assert branch.rows(size, offset) == sum(pattern.selects(branch, head, heads, p) for p in range(size))


def test_the_period_starts_every_branch_anew() -> None:
    pattern = Pattern.parse([4, 6, 10], [1, 2, 3])
    assert pattern.period == 60
    for branch in pattern.branches:
        assert all(
            pattern.selects(branch, 1, 3, p) == pattern.selects(branch, 1, 3, p + pattern.period) for p in range(60)
        )
