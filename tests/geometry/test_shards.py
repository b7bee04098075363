"""What shards send, and how much each computes: counted from the table of a pattern."""

from __future__ import annotations

from typing import Any

import pytest
from beyond import calls
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns import branches

from longnet.geometry import Pattern, score_pairs, score_pairs_by_shard
from longnet.geometry.shards import Shards, rows_sent, shared_keys, shared_rows

SHARDS = st.lists(st.integers(0, 20), min_size=1, max_size=5).map(tuple)
HEADS = st.sampled_from(((1, 1), (2, 1), (3, 3), (6, 2)))


@given(
    pairs=branches(),
    lengths=SHARDS,
    heads=HEADS,
    is_causal=st.booleans(),
    head_offsets=st.sampled_from(("interleaved", "blocked")),
)
@settings(max_examples=200, deadline=None)
def test_both_ways_to_say_what_travels_agree(
    pairs: Any, lengths: tuple[int, ...], heads: tuple[int, int], is_causal: bool, head_offsets: str
) -> None:
    pattern, shards = Pattern.parse(*zip(*pairs, strict=True), head_offsets), Shards(lengths)
    for owner in range(len(lengths)):
        sent = {}
        for receiver in range(len(lengths)):
            place = (pattern, *heads, shards, owner, receiver, is_causal)
            rows = sorted((pattern.branches[x.branch].segment_length, x.kv_head, *x.keys) for x in shared_rows(*place))
            keys = [
                (x.part.branch.segment_length, kv_head, x.size)  # type: ignore[union-attr]
                for x in shared_keys(*place)
                for kv_head in x.part.kv_heads
            ]
            assert sorted(keys) == sorted((w, kv_head, size) for w, kv_head, *_, size in rows)
            if rows:
                sent[receiver] = sum(size for *_, size in rows)
        assert rows_sent(pattern, *heads, shards, owner, is_causal) == sent


@given(call=calls(), lengths=SHARDS.filter(sum), heads=HEADS)
@settings(max_examples=200, deadline=None)
def test_pairs_by_shard(call: dict[str, Any], lengths: tuple[int, ...], heads: tuple[int, int]) -> None:
    names = ("window", "dilated_queries", "dilation_block", "head_offsets")
    pattern = Pattern.compose(
        call["segment_lengths"], call["dilation_rates"], **{name: call[name] for name in names}
    ).grouped(*heads)
    is_causal, total = call["is_causal"], sum(lengths)
    table = pattern.multiplicity(total, heads=heads[0], is_causal=is_causal)
    found, first = score_pairs_by_shard(pattern, heads[0], lengths, is_causal), 0
    for pairs, length in zip(found, lengths, strict=True):
        assert pairs == sum(sum(row) for head in table for row in head[first : first + length])
        first += length
    assert sum(found) == score_pairs(pattern, heads[0], total, is_causal)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_last_of_equal_causal_shards_computes_almost_twice_the_mean(ranks: int) -> None:
    pattern = Pattern.compose(None, 4, dilated_queries=False)
    found = score_pairs_by_shard(pattern, 8, [1 << 20] * ranks, is_causal=True)
    assert max(found) == found[-1] and found[-1] * ranks / sum(found) == pytest.approx(2 - 1 / ranks, abs=1e-5)
    assert len(set(score_pairs_by_shard(pattern, 8, [1 << 20] * ranks, is_causal=False))) == 1


def test_numbers_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shard_lengths\[1\]=-1: expected at least 0"):
        score_pairs_by_shard(Pattern.parse(4, 1), 2, [3, -1])
