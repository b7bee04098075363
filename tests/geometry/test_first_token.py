"""The keys of the first token, against the pattern's own predicate."""

from __future__ import annotations

import pytest

from longnet.geometry import Pattern
from longnet.geometry.first_token import first_keys
from longnet.geometry.pattern import PAPER_OFFSETS


@pytest.mark.parametrize("head_offsets", PAPER_OFFSETS)
@pytest.mark.parametrize(("lengths", "rates"), [((4, 9, 40), (1, 3, 8)), ((7, 7), (2, 2)), ((12,), (5,))])
@pytest.mark.parametrize("length", [1, 8, 31, 60])
def test_a_key_is_seen_as_often_as_branches_select_both(lengths, rates, head_offsets, length) -> None:
    pattern, heads = Pattern.parse(lengths, rates, head_offsets), 6
    found = {(head, key): 0 for head in range(heads) for key in range(length)}
    for keys in first_keys(pattern, heads, length):
        for head in keys.heads:
            for key in range(0, keys.end, keys.step):
                found[head, key] += 1
    for (head, key), times in found.items():
        assert times == sum(
            key < branch.segment_length
            and pattern.selects(branch, head, heads, 0)
            and pattern.selects(branch, head, heads, key)
            for branch in pattern.branches
        )
