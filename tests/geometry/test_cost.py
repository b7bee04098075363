from __future__ import annotations

import time
from fractions import Fraction
from typing import Any

import pytest
from beyond import calls
from hypothesis import given, settings
from hypothesis import strategies as st

from longnet.geometry.cost import cost, keys_per_query, score_pairs
from longnet.geometry.pattern import Pattern


@st.composite
def patterns(draw: st.DrawFn, nested: bool | None = None) -> Pattern:
    lengths = [draw(st.integers(1, 9))]
    for _ in range(draw(st.integers(0, 3))):
        lengths.append(lengths[-1] * draw(st.integers(1, 4)) if nested else draw(st.integers(1, 24)))
    rates = [draw(st.integers(1, min(length, 7))) for length in lengths]
    order = draw(st.permutations(range(len(lengths))))
    return Pattern.parse(
        [lengths[i] for i in order],
        [rates[i] for i in order],
        draw(st.sampled_from(["interleaved", "blocked"])),
    )


def brute_keys(pattern: Pattern, heads: int, length: int, is_causal: bool) -> list[int]:
    """Keys of every (head, query), by the definition and nothing else."""
    return [
        sum(
            pattern.selects(branch, head, heads, query)
            and pattern.selects(branch, head, heads, key)
            and query // branch.segment_length == key // branch.segment_length
            for branch in pattern.branches
            for key in range(query + 1 if is_causal else length)
        )
        for head in range(heads)
        for query in range(length)
    ]


@settings(max_examples=150, deadline=None)
@given(
    pattern=st.one_of(patterns(nested=True), patterns(nested=False)),
    heads=st.integers(1, 6),
    length=st.integers(1, 45),
    is_causal=st.booleans(),
)
def test_keys_and_pairs_equal_the_definition(pattern: Pattern, heads: int, length: int, is_causal: bool) -> None:
    keys = brute_keys(pattern, heads, length, is_causal)
    assert score_pairs(pattern, heads, length, is_causal) == sum(keys)
    found = keys_per_query(pattern, heads, length, is_causal)
    assert (found.min, found.mean, found.max) == (min(keys), Fraction(sum(keys), len(keys)), max(keys))


@settings(max_examples=100, deadline=None)
@given(call=calls(), heads=st.integers(1, 5), length=st.integers(1, 40))
def test_pairs_beyond_the_paper_equal_the_definition(call: dict[str, Any], heads: int, length: int) -> None:
    is_causal = call.pop("is_causal")
    del call["scale"]
    pattern = Pattern.compose(**call)
    table = pattern.multiplicity(length, heads=heads, is_causal=is_causal)
    assert score_pairs(pattern, heads, length, is_causal) == sum(sum(map(sum, head)) for head in table)


def test_pairs_of_a_long_sequence_are_counted_at_once() -> None:
    pattern = Pattern.compose(None, 4, window=512, dilated_queries=False, dilation_block=32)
    started = time.monotonic()
    pairs = score_pairs(pattern, 8, 1 << 40, is_causal=True)
    assert time.monotonic() - started < 1.0
    assert pairs / (8 * (1 << 40) ** 2 / 2) == pytest.approx(0.25, abs=1e-6)


@pytest.mark.parametrize("is_causal", [False, True])
def test_scan_of_one_period_and_its_rest_gives_the_extremes_of_a_long_sequence(is_causal: bool) -> None:
    pattern = Pattern.parse([6, 4], [4, 3])
    keys = brute_keys(pattern, 3, 29, is_causal)
    found = keys_per_query(pattern, 3, 29, is_causal)
    assert (found.min, found.max) == (min(keys), max(keys))


@pytest.mark.parametrize("head_offsets", ["interleaved", "blocked"])
def test_a_billion_tokens_take_no_time(head_offsets: str) -> None:
    pattern = Pattern.parse(
        [2048 << 2 * i for i in range(10)] + [10**9], [1, 2, 4, 6, 12, 16, 16, 16, 16, 16, 5], head_offsets
    )
    nested = Pattern.parse([2048, 16384, 2048 * 16, 1 << 30], [1, 6, 12, 16], head_offsets)
    began = time.perf_counter()
    assert score_pairs(pattern, 12, 10**9, True) < score_pairs(pattern, 12, 10**9, False)
    assert keys_per_query(nested, 12, 10**9, True).min == 1
    assert time.perf_counter() - began < 2


def test_one_branch_of_a_billion_tokens_is_counted_by_hand() -> None:
    pattern = Pattern.parse(1 << 30, 4)
    keys = keys_per_query(pattern, 4, 10**9, is_causal=True)
    assert (keys.min, keys.max) == (0, 250_000_000)
    assert score_pairs(pattern, 4, 10**9, True) == 4 * (250_000_000 * 250_000_001 // 2)


def test_extremes_that_cannot_be_had_are_refused_and_the_pairs_are_not() -> None:
    pattern = Pattern.parse([8191, 8209], [8, 8])
    with pytest.raises(ValueError, match=r"length=1000000000 .* divide"):
        keys_per_query(pattern, 4, 10**9)
    assert score_pairs(pattern, 4, 10**9) > 0


def test_cost_of_dense_attention_is_the_textbook_one() -> None:
    found = cost(Pattern.parse(64, 1), 3, 64, 16, batch=2)
    assert found.dilated == found.dense
    assert found.ratio == 1
    assert found.dense.pairs == 2 * 3 * 64 * 64
    assert found.dense.forward_flops == 4 * 16 * found.dense.pairs
    assert found.dense.backward_flops == 10 * 16 * found.dense.pairs
    tensor, lse = 2 * 3 * 64 * 16 * 2, 2 * 3 * 64 * 4
    assert found.dense.forward_bytes == 4 * tensor + lse
    assert found.dense.backward_bytes == 8 * tensor + lse


def test_cost_counts_the_shared_key_heads_once_and_the_ratio_exactly() -> None:
    whole = cost(Pattern.parse([8, 16], [1, 2]), 4, 32, 8, is_causal=True)
    shared = cost(Pattern.parse([8, 16], [1, 2]), 4, 32, 8, is_causal=True, kv_heads=1)
    assert whole.dilated.forward_flops == shared.dilated.forward_flops
    assert whole.dilated.forward_bytes - shared.dilated.forward_bytes == 2 * 3 * 32 * 8 * 2
    assert whole.ratio == Fraction(4 * (4 * 36 + 2 * 36), 4 * 32 * 33 // 2)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"heads": 0}, ValueError, "heads=0"),
        ({"length": 0}, ValueError, "length=0"),
        ({"length": 1.5}, TypeError, "length=1.5"),
        ({"head_dim": True}, TypeError, "head_dim=True"),
        ({"kv_heads": 3}, ValueError, "heads=4 is not divisible by kv_heads=3"),
    ],
)
def test_bad_numbers_are_named(change: dict, error: type[Exception], words: str) -> None:
    arguments = {"pattern": Pattern.parse(4, 2), "heads": 4, "length": 8, "head_dim": 2} | change
    with pytest.raises(error, match=words):
        cost(**arguments)
