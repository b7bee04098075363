"""However a stream is cut, its rows are those of the definition over everything read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import dense_attention
from patterns import Problem, problems, relative_error

from longnet import DilatedCache, dilated_attention, stream_attention
from longnet.attention.streaming import chunk
from longnet.attention.streaming.step import step

pytestmark = pytest.mark.filterwarnings("ignore:segment_lengths=.*to no head")


def a_cache(problem: Problem) -> DilatedCache:
    return DilatedCache(
        problem.segment_lengths,
        problem.dilation_rates,
        batch_size=problem.batch,
        heads=problem.heads,
        kv_heads=problem.kv_heads,
        head_dim=problem.head_dim,
        head_offsets=problem.head_offsets,
        dtype=problem.dtype,
    )


def streamed(problem: Problem, cuts, mask=None):
    tensors, cache, outs, start = [x.detach() for x in problem.tensors()], a_cache(problem), [], 0
    size = cache.nbytes
    for stop in [*sorted({cut for cut in cuts if cut < problem.length}), problem.length]:
        part = None if mask is None else mask[:, start:stop]
        outs.append(stream_attention(*(x[:, :, start:stop] for x in tensors), cache, key_padding_mask=part))
        start = stop
    assert cache.position == problem.length and cache.nbytes == size
    return torch.cat(outs, 2), cache


@given(problem=problems(), cuts=st.lists(st.integers(1, 44), max_size=8))
@settings(max_examples=60, deadline=None)
def test_rows_stored_by_their_places_are_those_stored_by_blocks(problem, cuts):
    """As on a GPU."""
    problem = replace(problem, is_causal=True, padding=None)
    _, by_blocks = streamed(problem, cuts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk, "_store", chunk._store_by_places)
        _, by_places = streamed(problem, cuts)
    assert torch.equal(by_places.keys, by_blocks.keys) and torch.equal(by_places.values, by_blocks.values)


@given(problem=problems(), cuts=st.lists(st.integers(1, 44), max_size=8), pad=st.booleans())
@settings(max_examples=120, deadline=None)
def test_any_split_equals_the_definition(problem, cuts, pad):
    problem = replace(problem, is_causal=True, padding=None)
    mask = None
    if pad:
        starts = torch.randint(
            problem.length + 1, (problem.batch,), generator=torch.Generator().manual_seed(problem.seed)
        )
        mask = torch.arange(problem.length) < starts[:, None]
    got, _ = streamed(problem, cuts, mask)
    inputs = [x.detach() for x in problem.tensors()]
    want, _ = dense_attention(
        *inputs,
        problem.segment_lengths,
        problem.dilation_rates,
        is_causal=True,
        key_padding_mask=mask,
        head_offsets=problem.head_offsets,
    )
    assert relative_error(got, want) < 1e-10


@given(problem=problems())
@settings(max_examples=40, deadline=None)
def test_the_capturable_step_equals_the_definition(problem):
    problem = replace(problem, is_causal=True, padding=None)
    tensors, cache, outs = [x.detach() for x in problem.tensors()], a_cache(problem), []
    # What has not been written yet must not matter.
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    for t in range(problem.length):
        outs.append(step(*(x[:, :, t : t + 1] for x in tensors), cache, problem.head_dim**-0.5)[0])
        cache.moved(1, on_device=False)
    want = dilated_attention(
        *tensors, problem.segment_lengths, problem.dilation_rates, is_causal=True, head_offsets=problem.head_offsets
    )
    assert relative_error(torch.cat(outs, 2), want) < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes_stay_near_one_call(dtype):
    problem = Problem(1, 2, 2, 300, 16, ((32, 1), (128, 4)), True, "interleaved", None, True, 3, dtype)
    got, _ = streamed(problem, [1, 60, 61, 200])
    exact, _ = dense_attention(
        *(x.detach().double() for x in problem.tensors()),
        problem.segment_lengths,
        problem.dilation_rates,
        is_causal=True,
    )
    whole = dilated_attention(
        *(x.detach() for x in problem.tensors()), problem.segment_lengths, problem.dilation_rates, is_causal=True
    )
    assert relative_error(got, exact) <= 2 * max(relative_error(whole, exact), 1e-6)


@pytest.mark.parametrize("kv_heads", [6, 2])
def test_storage_is_exactly_what_can_be_reached(kv_heads):
    cache = DilatedCache((10, 21), (1, 4), batch_size=3, heads=6, kv_heads=kv_heads, head_dim=8, dtype=torch.float64)
    # Heads of a key/value head share rows where they have one offset: at rate 1 all do, at rate 4 none of these.
    at_rate_4 = [-(-(21 - head % 4) // 4) for head in range(6)]
    rows = 10 * kv_heads + sum(at_rate_4)
    assert cache.keys.nbytes + cache.values.nbytes == 2 * 3 * 8 * 8 * rows
    assert cache.nbytes - cache.keys.nbytes - cache.values.nbytes <= 2 * 4096


def test_a_stream_goes_on_past_2_to_the_31():
    problem = Problem(1, 2, 1, 40, 4, ((8, 1), (16, 3)), True, "interleaved", None, False, 5)
    near, _ = streamed(problem, [7, 20])
    tensors, cache = [x.detach() for x in problem.tensors()], a_cache(problem)
    # A multiple of every segment length: the grid is where it was.
    cache.load_state_dict({**cache.state_dict(), "position": torch.tensor(2**40)})
    far = [stream_attention(*(x[:, :, a:b] for x in tensors), cache) for a, b in ((0, 13), (13, 40))]
    assert cache.position == 2**40 + 40
    assert relative_error(torch.cat(far, 2), near) < 1e-12


def test_bad_input_teaches_and_leaves_the_cache_alone():
    problem = Problem(2, 2, 1, 30, 4, ((8, 1),), True, "interleaved", None, False, 5)
    _, cache = streamed(problem, [11])
    before = cache.state_dict()
    q, k, v = (x.detach()[:, :, :3] for x in problem.tensors())
    hole = torch.tensor([[False, True, False]] * 2)
    for arguments, options, error, said in (
        ((q[:, :, :0], k[:, :, :0], v[:, :, :0]), {}, ValueError, "expected T >= 1 tokens"),
        ((q[:1], k[:1], v[:1]), {}, ValueError, "by the cache"),
        ((q.float(), k.float(), v.float()), {}, ValueError, "dtype torch.float32: expected the cache's torch.float64"),
        ((q.requires_grad_(), k, v), {}, ValueError, "requires a gradient and a cache holds no graph"),
        ((q.detach(), k, v), {"key_padding_mask": hole}, ValueError, "True after a real token"),
        ((q.detach(), k, v), {"scale": "x"}, TypeError, "scale='x' has type str"),
    ):
        with pytest.raises(error, match=said):
            stream_attention(*arguments, cache, **options)
    for change, said in (
        ({"segment_lengths": torch.tensor([9])}, "expected this cache's"),
        ({"keys": before["keys"][:, :2]}, "has shape"),
        ({"position": torch.tensor(-1)}, "expected a number of tokens"),
        ({"more": torch.tensor(1)}, "state holds"),
    ):
        with pytest.raises(ValueError, match=said):
            cache.load_state_dict({**before, **change})
    after = cache.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
