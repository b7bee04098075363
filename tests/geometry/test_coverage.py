from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longnet.geometry.coverage import coverage, uncovered_positions
from longnet.geometry.pattern import HEAD_OFFSETS, Pattern
from longnet.geometry.reach import reach, receptive_field


@st.composite
def patterns(draw: st.DrawFn) -> Pattern:
    lengths = [draw(st.integers(1, 9))]
    nested = draw(st.booleans())
    for _ in range(draw(st.integers(0, 3))):
        lengths.append(lengths[-1] * draw(st.integers(1, 4)) if nested else draw(st.integers(1, 20)))
    rates = [draw(st.integers(1, min(length, 8))) for length in lengths]
    return Pattern.parse(lengths, rates, draw(st.sampled_from(["interleaved", "blocked"])))


@st.composite
def composed_patterns(draw: st.DrawFn) -> Pattern:
    branches = draw(st.lists(st.tuples(st.none() | st.integers(4, 20), st.integers(1, 4)), min_size=1, max_size=3))
    return Pattern.compose(
        [length for length, _ in branches],
        [rate for _, rate in branches],
        window=draw(st.sampled_from([None, None, None, 3])),
        dilated_queries=draw(st.booleans()),
        dilation_block=draw(st.integers(1, 5)),
        head_offsets=draw(st.sampled_from(HEAD_OFFSETS)),
    )


def takes_part(pattern: Pattern, head: int, heads: int, position: int) -> bool:
    return pattern.window is not None or any(
        pattern.selects(branch, head, heads, position) for branch in pattern.branches
    )


@settings(max_examples=200, deadline=None)
@given(pattern=patterns() | composed_patterns(), heads=st.integers(1, 6), length=st.integers(1, 120))
def test_coverage_equals_the_definition(pattern: Pattern, heads: int, length: int) -> None:
    found = coverage(pattern, heads, length)
    missed = [{p for p in range(length) if not takes_part(pattern, head, heads, p)} for head in range(heads)]
    assert [head.count for head in found.heads] == [len(positions) for positions in missed]
    assert found.fractions == tuple(1 - Fraction(len(positions), length) for positions in missed)
    nobody = set.intersection(*missed)
    assert found.uncovered.count == len(nobody)
    assert bool(found.uncovered) == bool(nobody)
    for what, positions in [*zip(found.heads, missed, strict=True), (found.uncovered, nobody)]:
        if what:
            assert positions_described(what.description, length) == positions


def positions_described(description: str, length: int) -> set[int]:
    """Read the words back as the condition they state."""
    assert description.startswith("positions p with ")
    condition = description.removeprefix("positions p with ").replace(" mod ", " % ")
    if "..." in condition:
        pieces = []
        for piece in condition.split(" and "):
            left, _, listed = piece.partition(" in ")
            if "..." in listed:
                first, last = listed.strip("{}").split(", ")[0], listed.strip("{}").split(", ")[-1]
                piece = f"{first} <= {left} <= {last}"
            pieces.append(piece)
        condition = " and ".join(pieces)
    return {p for p in range(length) if eval(condition, {"p": p})}


@settings(max_examples=60, deadline=None)
@given(pattern=patterns(), heads=st.integers(1, 6))
def test_the_endless_sequence_is_one_repetition_counted(pattern: Pattern, heads: int) -> None:
    found = coverage(pattern, heads)
    period = pattern.period
    for head, what in enumerate(found.heads):
        missed = sum(not takes_part(pattern, head, heads, p) for p in range(period))
        assert what.fraction == Fraction(missed, period)


@pytest.mark.parametrize(
    ("segments", "rates", "heads", "head_offsets", "words", "fraction"),
    [
        (2048, 8, 6, "interleaved", "positions p with p mod 8 in {6, 7}", Fraction(1, 4)),
        (2048, 8, 12, "blocked", "positions p with p mod 8 in {6, 7}", Fraction(1, 4)),
        (2048, 6, 4, "interleaved", "positions p with p mod 2048 mod 6 in {4, 5}", Fraction(682, 2048)),
        ([64, 128], [8, 16], 4, "interleaved", "positions p with p mod 8 in {4, 5, 6, 7}", Fraction(1, 2)),
        (64, 32, 4, "interleaved", "positions p with p mod 32 in {4, 5, ..., 31}", Fraction(28, 32)),
        (64, 8, 1, "interleaved", "positions p with p mod 8 != 0", Fraction(7, 8)),
    ],
)
def test_uncovered_positions_are_named(segments, rates, heads, head_offsets, words, fraction) -> None:
    found = uncovered_positions(Pattern.parse(segments, rates, head_offsets), heads)
    assert found
    assert (found.description, found.fraction) == (words, fraction)


def test_a_pattern_whose_heads_fill_a_branch_leaves_nothing() -> None:
    found = uncovered_positions(Pattern.parse([2048, 4096], [8, 16]), 8)
    assert not found
    assert (found.count, found.description) == (0, "no positions")
    per_head = coverage(Pattern.parse([2048, 4096], [8, 16]), 8)
    assert per_head.heads[3].description == "positions p with p mod 8 != 3"


def test_a_billion_positions_take_no_time() -> None:
    began = time.perf_counter()
    shifted = Pattern.parse([2**20, 2**25, 2**30], [12, 24, 20])
    assert coverage(shifted, 8, 10**9).uncovered.fraction > 0
    assert coverage(Pattern.parse([10**9, 10**9 + 7], [3, 1]), 2).fractions == (1, 1)
    assert uncovered_positions(Pattern.parse(10**9 + 1, 12), 8).positions == 10**9 + 1
    assert time.perf_counter() - began < 2


def test_a_selection_too_long_to_count_is_refused() -> None:
    with pytest.raises(ValueError, match="segment length, rate"):
        uncovered_positions(Pattern.parse([10**9 + 7, 10**9 + 9], [12, 12]), 4)


def brute_reach(
    pattern: Pattern, heads: int, length: int, is_causal: bool, layers: int, position: int
) -> list[set[int]]:
    reached = [{position}]
    for _ in range(layers):
        reached.append(
            reached[-1]
            | {
                key
                for query in reached[-1]
                for key in range(query + 1 if is_causal else length)
                for branch in pattern.branches
                for head in range(heads)
                if query // branch.segment_length == key // branch.segment_length
                and pattern.selects(branch, head, heads, query)
                and pattern.selects(branch, head, heads, key)
            }
        )
    return reached


@settings(max_examples=60, deadline=None)
@given(
    pattern=patterns(),
    heads=st.integers(1, 4),
    length=st.integers(1, 40),
    is_causal=st.booleans(),
    data=st.data(),
)
def test_receptive_field_equals_the_definition(pattern, heads, length, is_causal, data) -> None:
    position = data.draw(st.integers(0, length - 1))
    expected = brute_reach(pattern, heads, length, is_causal, 3, position)
    start, masks = reach(pattern, heads, length, 3, is_causal, position)
    assert [{start + bit for bit in range(mask.bit_length()) if mask >> bit & 1} for mask in masks] == expected
    for layer, found in enumerate(receptive_field(pattern, heads, length, 3, is_causal, position), 1):
        assert found.layer == layer
        assert found.tokens == len(expected[layer])
        assert found.farthest == max(abs(p - position) for p in expected[layer])
        assert found.fraction == Fraction(len(expected[layer]), position + 1 if is_causal else length)


def test_receptive_field_of_a_long_sequence_is_quick_and_grows() -> None:
    began = time.perf_counter()
    found = receptive_field(Pattern.parse([64, 1024, 16384, 131072], [1, 16, 64, 64]), 8, 100_000, 3, True)
    assert found[0].tokens < found[1].tokens <= found[2].tokens
    tiny = receptive_field(Pattern.parse([4, 100_000], [4, 4]), 4, 100_000, 3, True)
    assert tiny[-1].tokens == 25_000
    far = receptive_field(Pattern.parse([2048, 4096], [1, 2]), 2, 10**9, 2, True)
    assert far[-1].visible == 10**9
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"position": 8}, "position=8"),
        ({"position": -1}, "position=-1"),
        ({"layers": 0}, "layers=0"),
        ({"heads": 0}, "heads=0"),
        ({"pattern": Pattern.parse(1 << 24, 1), "length": 1 << 24}, "asks to follow 16777216 tokens"),
    ],
)
def test_bad_questions_are_named(change: dict, words: str) -> None:
    arguments = {"pattern": Pattern.parse(8, 2), "heads": 2, "length": 8, "layers": 2} | change
    with pytest.raises(ValueError, match=words):
        receptive_field(**arguments)
