"""Receptive fields, coverage and pairs with windows, strides, blocks and offset grids, against the table of pairs."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from beyond import calls
from hypothesis import given
from hypothesis import strategies as st
from oracle import multiplicity
from torch import Tensor

from longnet.geometry import Pattern, cost, receptive_field, score_pairs
from longnet.geometry.reach import LayerAttention, stack_reach, stack_receptive_field, uncovered_by_stack

HEADS = [(1, 1), (2, 1), (4, 2), (3, 3)]


@st.composite
def layers(draw: st.DrawFn) -> tuple[LayerAttention, dict[str, Any]]:
    """A layer, and the arguments of its table."""
    heads, kv_heads = draw(st.sampled_from(HEADS))
    call = draw(calls())
    branches = call.pop("segment_lengths"), call.pop("dilation_rates")
    call = {name: call[name] for name in ("window", "dilated_queries", "dilation_block", "head_offsets")}
    if draw(st.integers(0, 9)) == 0:
        call["dilation_block"] = 1 << 36
    pattern = Pattern.compose(*branches, **call).grouped(heads, kv_heads)
    offset = draw(st.sampled_from([0, 0, -1, 1 << 40, -(1 << 40)]) | st.integers(-70, 70))
    head_offsets = call.pop("head_offsets")
    table = {"args": (*branches, heads), "head_offsets": head_offsets, "kv_heads": kv_heads, "segment_offset": offset}
    return LayerAttention(pattern, heads, offset, draw(st.booleans())), table | call


def pairs(table: dict[str, Any], length: int, is_causal: bool) -> Tensor:
    options = dict(table)
    return multiplicity(*options.pop("args"), length, is_causal, options.pop("head_offsets"), **options)


def as_mask(places: Tensor) -> int:
    return sum(1 << place for place in places.nonzero()[:, 0].tolist())


@given(layers(), st.integers(1, 90), st.booleans())
def test_pairs_are_counted(one: tuple[LayerAttention, dict[str, Any]], length: int, is_causal: bool) -> None:
    layer, table = one
    counted = score_pairs(layer.pattern, layer.heads, length, is_causal, segment_offset=layer.segment_offset)
    assert counted == int(pairs(table, length, is_causal).sum())
    ratio = cost(
        layer.pattern, layer.heads, length, 8, is_causal=is_causal, kv_heads=table["kv_heads"],
        segment_offset=layer.segment_offset,
    ).ratio  # fmt: skip
    assert ratio == Fraction(counted, layer.heads * (length * (length + 1) // 2 if is_causal else length**2))


@given(st.data(), st.lists(layers(), min_size=1, max_size=2), st.integers(1, 90), st.booleans())
def test_stacks_reach_what_their_tables_say(
    data: st.DataObject, kinds: list[tuple[LayerAttention, dict[str, Any]]], length: int, is_causal: bool
) -> None:
    stack = [data.draw(st.sampled_from(kinds)) for _ in range(data.draw(st.integers(1, 4)))]
    position = data.draw(st.integers(0, length - 1))
    reads = [(pairs(table, length, is_causal).sum(0) > 0, layer.shift_keys) for layer, table in stack]
    start, masks = stack_reach([layer for layer, _ in stack], length, is_causal, position)
    for depth, mask in enumerate(masks):
        reached = torch.arange(length) == position
        for read, shift_keys in reversed(reads[:depth]):
            keys = (read & reached[:, None]).any(0)
            reached = reached | keys | (shift_keys & torch.cat((keys[1:], torch.zeros(1, dtype=torch.bool))))
        assert mask << start == as_mask(reached)


@given(st.lists(layers(), min_size=1, max_size=3), st.integers(1, 90))
def test_coverage_is_of_all_layers_together(stack: list[tuple[LayerAttention, dict[str, Any]]], length: int) -> None:
    keys = queries = torch.zeros(length, dtype=torch.bool)
    for layer, table in stack:
        read = pairs(table, length, False).sum(0) > 0
        everything = not layer.pattern.dilated_queries or layer.pattern.window is not None
        keys, queries = keys | read.any(0), queries | read.any(1) | everything
    assert uncovered_by_stack([layer for layer, _ in stack], length) == as_mask(~(keys & queries))


def test_a_long_stack_is_followed_to_its_length() -> None:
    """Windows of 512 alone see 511 tokens farther by layer; with strides between them all tokens in two layers."""
    window = LayerAttention(Pattern.compose(window=512), 4)
    strided = LayerAttention(Pattern.compose(None, 4, window=512, dilated_queries=False), 4)
    alone = stack_receptive_field([window] * 12, 100_000, is_causal=True)
    assert [one.farthest for one in alone] == [511 * layer for layer in range(1, 13)]
    mixed = stack_receptive_field([window, strided] * 2, 100_000, is_causal=True)
    assert [one.tokens for one in mixed] == [512, 100_000, 100_000, 100_000]


def test_short_segments_on_another_grid() -> None:
    pattern = Pattern.parse((16, 32), (1, 2))
    seen = receptive_field(pattern, 2, 1000, 3, True, 500, segment_offset=21)
    # (500 + 21) mod 32 = 9 tokens before this one lie in its segment.
    assert seen[-1].farthest == 9


def test_an_offset_is_an_int() -> None:
    with pytest.raises(TypeError, match="segment_offset=0.5"):
        receptive_field(Pattern.parse(8, 1), 1, 8, 1, segment_offset=0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="segment_offset=True"):
        score_pairs(Pattern.parse(8, 1), 1, 8, segment_offset=True)
