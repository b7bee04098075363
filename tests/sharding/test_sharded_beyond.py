"""Windows, all queries, blocks, segments without end and other grids over shards: what the definition gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from beyond import calls
from hypothesis import given, settings
from hypothesis import strategies as st
from on_shards import bytes_sent, run_in_rectangles, run_shard, shard_of, together
from patterns import relative_error
from sharded_cases import MIXED, PAPER, Case, compare

from longnet.attention.functional import pattern_attention
from longnet.attention.sharding.ordinary import cut
from longnet.geometry import Pattern
from longnet.geometry.shards import Shards, rows_sent

pytestmark = pytest.mark.filterwarnings("ignore:segment_lengths=")


def run_poisoned(group, rank, case):
    """With uninitialised memory that holds NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(8).isnan().all(), "uninitialised memory is not poisoned"
        return run_shard(group, rank, case)
    finally:
        torch.use_deterministic_algorithms(False)


OFFSETS = st.integers(-100, 100)


@st.composite
def cases(draw):
    size = draw(st.integers(1, 4))
    kv_heads, group = draw(st.sampled_from(((1, 1), (2, 1), (1, 3), (2, 2), (5, 1), (2, 3))))
    return Case(
        tuple(draw(st.lists(st.integers(0, 40), min_size=size, max_size=size).filter(sum))),
        draw(calls()),
        draw(st.one_of(st.just(0), OFFSETS, st.lists(OFFSETS, min_size=1, max_size=3).map(tuple))),
        kv_heads,
        group,
        padded=draw(st.booleans()),
        biased=draw(st.booleans()),
        backend=draw(st.sampled_from(("auto", "auto", "portable"))),
        seed=draw(st.integers(0, 3)),
    )


@given(case=cases())
@settings(max_examples=200, deadline=None)
def test_shards_give_what_the_definition_gives(ranks, case):
    compare(ranks, case)


@given(case=cases())
@settings(max_examples=200, deadline=None)
def test_shards_whose_received_keys_are_read_by_a_backend(ranks, case):
    compare(ranks, replace(case, biased=False), run=run_in_rectangles)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("offset", [5, (7, -3, 7)])
def test_all_kinds_in_one_softmax_and_no_memory_is_read_before_it_is_written(ranks, offset, padded, is_causal):
    case = Case((30, 0, 7, 41), MIXED | {"is_causal": is_causal}, offset, padded=padded, biased=True)
    compare(ranks, case, run=run_poisoned)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("shards", [(16, 16, 16), (17, 20, 11)])
def test_a_padded_key_of_the_papers_pattern_may_hold_nan(ranks, shards, is_causal):
    compare(ranks, Case(shards, MIXED | PAPER | {"dilation_block": 1, "is_causal": is_causal}, padded=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shorter_types(ranks, dtype):
    case = Case((40, 25, 0, 50), offset=11, dtype=dtype)
    got, alone = together(ranks(4, run_shard, case)), case.run(case.inputs())
    inputs = {name: x if x is None else x.double() for name, x in case.inputs().items()}
    want = replace(case, dtype=torch.float64).run(inputs, exact=True)
    for name in want:
        # Whatever one device loses to this type, and half as much again: sums are rounded once more.
        allowed = 1.5 * relative_error(alone[name], want[name])
        assert relative_error(got[name], want[name]) < allowed, name


@pytest.mark.parametrize("call", [MIXED, MIXED | PAPER | {"dilation_block": 1}])
@pytest.mark.parametrize(("shards", "offset"), [((5, 0, 9), ()), ((0, 0), (3, 4)), ((0, 0, 0), 0)])
def test_no_sequence_and_no_token(ranks, shards, offset, call):
    compare(ranks, Case(shards, call, offset, padded=True))


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_branch_given_twice_counts_twice(ranks, is_causal):
    call = {"segment_lengths": (None, 40, None, 40), "dilation_rates": (3, 2, 3, 2), "is_causal": is_causal}
    compare(ranks, Case((20, 31, 9), MIXED | call, 3))


@pytest.mark.parametrize("head_offsets", ["interleaved", "blocked", "grouped"])
def test_heads_that_are_left_of_more(ranks, head_offsets):
    case = Case((20, 31), MIXED | {"head_offsets": head_offsets}, 4, pruned=2)
    got, want = together(ranks(2, run_shard, case)), case.run(case.inputs())
    for name in want:
        assert relative_error(got[name], want[name]) < 1e-10, name


def run_compiled(group, rank, case):
    inputs = shard_of(case, rank)
    tensors = [inputs[name].requires_grad_() for name in ("query", "key", "value")]

    def attend(query, key, value, offset):
        return 2 * pattern_attention(
            query, key, value, case.pattern, is_causal=True, segment_offset=offset, group=group
        )

    out = torch.compile(attend, backend="aot_eager")(*tensors, case.segment_offset)
    grads = torch.autograd.grad(out, tensors, inputs["grad"])
    return {"out": out.detach() / 2, **{name: x / 2 for name, x in zip(("query", "key", "value"), grads, strict=True)}}


@pytest.mark.parametrize("offset", [6, (6, -5)])
def test_compiled(ranks, offset):
    case = Case((20, 31), offset=offset)
    got = together(ranks(2, run_compiled, case))
    inputs = case.inputs()
    want = case.run(inputs | {"grad_lse": torch.zeros_like(inputs["grad_lse"])}, exact=True)
    for name in got:
        assert relative_error(got[name], want[name]) < 1e-10, name


def twice(group, rank, case):
    return [run_shard(group, rank, case) for _ in range(2)]


def test_two_runs_are_bit_identical(ranks):
    case = Case((33, 64, 47, 80), MIXED | {"is_causal": False}, (4, 9), dtype=torch.float32)
    for one, other in ranks(4, twice, case):
        assert all(torch.equal(one[name], other[name]) for name in one)


def changed_later(group, rank, case, first):
    """Whether rows before ``first`` keep their bits when tokens from there on change."""
    inputs = case.inputs()
    found = []
    for change in (0.0, 1.0):
        tensors = [inputs[name].clone() for name in ("query", "key", "value")]
        for x in tensors:
            x[:, :, first:] += change
        query, key, value = (x.split(case.shards, 2)[rank] for x in tensors)
        options = {"is_causal": True, "segment_offset": case.segment_offset, "return_lse": True, "group": group}
        found.append(pattern_attention(query, key, value, case.pattern, **options))
    kept = max(0, first - sum(case.shards[:rank]))
    return all(torch.equal(x[:, :, :kept], y[:, :, :kept]) for x, y in zip(*found, strict=True))


def test_later_tokens_change_no_bit_of_earlier_rows(ranks):
    case = Case((40, 25, 50), offset=(3, -8), dtype=torch.float32)
    assert all(ranks(3, changed_later, case, 55))


def keys_needed(case, offset):
    """By owner and receiver, how many rows the definition makes travel: every key of a part that a query there reads."""
    pattern, starts = case.pattern.grouped(case.heads, case.kv_heads), [0]
    for length in case.shards:
        starts.append(starts[-1] + length)
    owner = [rank for rank, length in enumerate(case.shards) for _ in range(length)]
    parts = [replace(pattern, branches=())] if pattern.window is not None else []
    parts += [pattern.of(branch) for branch in pattern.branches]
    needed = set()
    for number, part in enumerate(parts):
        table = part.multiplicity(starts[-1], heads=case.heads, is_causal=case.call["is_causal"], segment_offset=offset)
        for head in range(case.heads):
            choice = part.offset(part.branches[0], head, case.heads) if part.branches else None
            for q, row in enumerate(table[head]):
                for k, times in enumerate(row):
                    if times and owner[q] != owner[k]:
                        needed.add((owner[k], owner[q], number, head // case.group, choice, k))
    return torch.tensor(
        [[sum(one[:2] == (a, b) for one in needed) for b in range(len(case.shards))] for a in range(len(case.shards))]
    )


BYTES = [
    MIXED,
    MIXED | {"is_causal": False},
    MIXED | {"dilated_queries": True, "window": None, "head_offsets": "blocked"},
    MIXED | {"segment_lengths": (), "dilation_rates": (), "window": 30, "is_causal": False},
    MIXED | {"segment_lengths": (None,), "dilation_rates": (4,), "dilation_block": 1, "head_offsets": "grouped"},
]


@pytest.mark.parametrize("offset", [0, 13, (5, 0, 5)])
@pytest.mark.parametrize("call", BYTES)
@pytest.mark.parametrize("shards", [(16,) * 4, (20, 0, 3, 31)])
def test_exactly_the_rows_that_others_need_travel(ranks, shards, call, offset):
    case = Case(shards, call, offset)
    offsets = [offset] if isinstance(offset, int) else offset
    needed = sum(keys_needed(case, one) for one in offsets)
    pattern = case.pattern.grouped(case.heads, case.kv_heads)
    place = (pattern, case.heads, case.kv_heads, Shards(shards))
    row = 2 * 4 * 8  # a key and a value in float64
    for rank, (forward, backward) in enumerate(ranks(len(shards), bytes_sent, case)):
        assert forward == (needed[rank] * row).tolist()
        assert backward == (needed[:, rank] * row).tolist()
        planned = torch.zeros(len(shards), dtype=torch.int64)
        for one in offsets:
            for receiver, rows in rows_sent(*place, rank, call["is_causal"], one).items():
                planned[receiver] += rows
        assert torch.equal(planned, needed[rank])


def refusal(group, rank, changes):
    """The call of a rank that differs from the others by ``changes[rank]``."""
    call = {"segment_lengths": None, "dilation_rates": 2, "dilated_queries": False, "window": 3, "segment_offset": 1}
    call |= changes.get(rank, {})
    offset = call.pop("segment_offset")
    x = torch.ones(2, 2, 8, 4)
    pattern = Pattern.compose(call.pop("segment_lengths"), call.pop("dilation_rates"), **call)
    pattern_attention(x, x, x, pattern, segment_offset=offset, group=group)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"segment_offset": 2}, "segment_offset is 1 on rank 0, 2 on rank 1, 1 on rank 2"),
        ({"segment_offset": torch.tensor([1, 2])}, r"segment_offset is 1 on rank 0, (1, 2) on rank 1"),
        ({"segment_offset": 1.0}, "segment_offset=1.0 has type float"),
        ({"segment_offset": torch.tensor([1])}, "segment_offset has shape (1,): expected (B,) = (2,)"),
        ({"segment_offset": torch.tensor([1, 2], device="meta")}, "segment_offset is on meta: expected a CPU tensor"),
        ({"window": 4}, "pattern is"),
        ({"dilated_queries": True}, "pattern is"),
    ],
)
def test_what_one_rank_gets_wrong_raises_on_every_rank(ranks, change, said):
    for ok, error in ranks.outcomes(3, refusal, {1: change}):
        assert not ok and said in error, error
    # And they can go on. A tensor with one value is the number.
    for ok, error in ranks.outcomes(3, refusal, {1: {"segment_offset": torch.tensor([1, 1])}}):
        assert ok, error


def test_numbers_as_large_as_they_may_be(ranks):
    largest = 1 << 40
    call = MIXED | {"segment_lengths": (None, largest), "dilation_block": largest // 4, "window": largest}
    call |= {"dilation_rates": (3, 4)}
    for offset in (largest, (largest, -largest)):
        compare(ranks, Case((5, 3, 9), call, offset))
    for ok, error in ranks.outcomes(2, run_shard, Case((5, 3), call, (largest + 1, 0))):
        assert not ok and f"segment_offset holds {largest + 1}: expected at most" in error, error


@given(sizes=st.tuples(st.integers(512, 100_000), st.integers(512, 100_000)))
def test_pieces_are_little_more_than_all_pairs(sizes):
    queries, keys = sizes
    pieces, key_pieces, size = cut(queries, keys)
    assert pieces * size >= queries and key_pieces * size >= keys and min(pieces, key_pieces) <= 3
    assert pieces * key_pieces * size**2 < 1.3 * queries * keys


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("shards", [(40, 9), (9, 40), (23, 7, 1, 30), (16, 16)])
@pytest.mark.parametrize("window", [2, 9, 10, 16, 24, 41, 60])
def test_windows_of_any_length_over_shards_of_any(ranks, window, shards, is_causal):
    call = MIXED | {"segment_lengths": (), "dilation_rates": (), "window": window, "is_causal": is_causal}
    compare(ranks, Case(shards, call, padded=True), run=run_in_rectangles)
