"""``stream_attention`` against the dense float64 oracle and the full call, for any split into chunks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import dense_attention
from patterns import relative_error
from streams import Stream, by_step, read, streams
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longnet import DilatedCache, dilated_attention, stream_attention
from longnet.attention import chunked
from longnet.attention.streaming import rectangle
from longnet.attention.streaming.step import step

pytestmark = pytest.mark.filterwarnings("ignore:segment_lengths=.*to no head")


def full_call(stream: Stream) -> torch.Tensor:
    return dilated_attention(
        *stream.tensors(),
        *stream.pattern,
        is_causal=True,
        key_padding_mask=stream.mask(),
        head_offsets=stream.head_offsets,
    )


@given(stream=streams())
@settings(max_examples=300)
def test_any_split_gives_the_rows_of_one_call(stream):
    cache = stream.cache()
    out = read(stream, cache)
    assert cache.position == stream.length
    assert relative_error(out, stream.expected()) < 1e-10
    assert relative_error(out, full_call(stream)) < 1e-10


@given(stream=streams(), data=st.data())
@settings(max_examples=120)
def test_steps_give_the_rows_of_one_call(stream, data):
    """A chunk, then single tokens to the end: as chunks of one, and on the path of fixed shapes."""
    prompt = data.draw(st.integers(0, stream.length - 1))
    steps = replace(stream, cuts=tuple(range(max(prompt, 1), stream.length)))
    expected = stream.expected()
    for attend in (stream_attention, by_step):
        cache = stream.cache()
        assert relative_error(read(steps, cache, attend=attend), expected) < 1e-10
        assert int(cache.position_tensor) == cache.position == stream.length


@pytest.mark.parametrize("attend", [stream_attention, by_step])
def test_heads_of_one_block_at_unequal_steps(attend):
    """Groups of four query heads at rate 3: every third key/value head has two readers of one offset, the others one."""
    stream = Stream(((20, 3), (9, 1)), 50, (7, 11, *range(25, 40)), kv_heads=6, group=4)
    cache = stream.cache()
    assert any(isinstance(block.heads, list) for _, blocks in cache.layout.branches for block in blocks)
    assert relative_error(read(stream, cache, attend=attend), stream.expected()) < 1e-10


PAPER_LIKE = ((300, 1), (700, 2), (1600, 5))
# Chunks inside one segment, across one boundary, across several; starts on and off the rates.
CUTS = (1, 2, 100, 110, 111, 300, 640, 1399, 1400, 1601, 1660)


@pytest.mark.parametrize("head_offsets", ["interleaved", "blocked"])
@pytest.mark.parametrize("group", [1, 3])
def test_segments_longer_than_the_kernels_own_blocks(head_offsets, group):
    stream = Stream(PAPER_LIKE, 1733, CUTS, batch=2, group=group, head_offsets=head_offsets, lead=(0, 350), seed=7)
    assert relative_error(read(stream, stream.cache()), full_call(stream)) < 1e-10


@pytest.mark.parametrize("branches", [((8, 1), (16, 2), (32, 4)), ((7, 3), (10, 1), (23, 5)), ((1, 1),), ((9, 9),)])
def test_single_tokens_over_many_segments(branches):
    stream = Stream(branches, 150, tuple(range(150)), kv_heads=4, batch=2, lead=(0, 9))
    for attend in (stream_attention, by_step):
        assert relative_error(read(stream, stream.cache(), attend=attend), stream.expected()) < 1e-10


@given(stream=streams())
@settings(max_examples=80)
def test_matrix_products_in_place_of_the_cpu_kernel(stream):
    """What other devices run, a few queries at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rectangle, "_by_cpu_flash", rectangle._by_products)
        patch.setattr(chunked, "_SCORES", 16)
        assert relative_error(read(stream, stream.cache()), stream.expected()) < 1e-10


@given(stream=streams())
@settings(max_examples=40)
def test_float32(stream):
    stream = replace(stream, dtype=torch.float32)
    for attend in (stream_attention, by_step):
        assert relative_error(read(stream, stream.cache(), attend=attend), stream.expected()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_the_full_call(dtype):
    cuts = (*CUTS, *range(1000, 1100))
    stream = Stream(PAPER_LIKE, 1733, cuts, batch=1, kv_heads=3, head_dim=16, dtype=dtype)
    expected = stream.expected()
    allowed = 1.2 * relative_error(full_call(stream), expected)
    for attend in (stream_attention, by_step):
        out = read(stream, stream.cache(), attend=attend)
        assert out.dtype == dtype
        assert relative_error(out, expected) < allowed, attend


@pytest.mark.parametrize("attend", [stream_attention, by_step])
def test_far_positions_are_like_near_ones(attend):
    """A stream at a multiple of the period is at the start of a segment in every branch, however far that is."""
    stream = Stream(((6, 1), (10, 3)), 47, (13, 20, *range(25, 35)), batch=2, kv_heads=3)
    expected = stream.expected()
    for far in (30 * 2**31, 30 * (10**15 + 1)):
        for first in (0, 13):
            cache = stream.cache()
            near = [read(stream, cache, last=first)] if first else []
            state = cache.state_dict()
            cache.load_state_dict({**state, "position": state["position"] + far})
            out = torch.cat([*near, read(stream, cache, first=first, attend=attend)], dim=2)
            assert relative_error(out, expected) < 1e-10
            assert cache.position == int(cache.position_tensor) == far + stream.length


@pytest.mark.parametrize("attend", [stream_attention, by_step])
def test_a_key_that_is_out_of_reach_is_gone(attend):
    """A NaN in one segment reaches the rest of that segment, and nothing after it."""
    stream = Stream(((8, 1), (8, 2)), 32, (3, *range(6, 32)), kv_heads=2)
    query, key, value = stream.tensors()
    key[:, :, 2], value[:, :, 2] = torch.nan, torch.nan
    out = read(stream, stream.cache(), [query, key, value], attend=attend)
    assert out[:, :, 2:8].isnan().all()
    assert relative_error(out[:, :, 8:], stream.expected()[:, :, 8:]) < 1e-10


@pytest.mark.parametrize("attend", [stream_attention, by_step])
def test_what_padding_holds_never_counts(attend):
    stream = Stream(((8, 1), (20, 3)), 40, (3, *range(14, 30)), batch=3, kv_heads=4, lead=(0, 10, 25))
    query, key, value = stream.tensors()
    padded = stream.mask()[:, None, :, None]
    key, value = key.masked_fill(padded, torch.nan), value.masked_fill(padded, torch.nan)
    assert relative_error(read(stream, stream.cache(), [query, key, value], attend=attend), stream.expected()) < 1e-10


def test_padding_may_be_told_for_some_chunks_only():
    """Once every row has begun, a mask says nothing new and may be left out."""
    stream = Stream(((8, 1), (20, 3)), 40, batch=2, kv_heads=3, lead=(0, 5))
    cache, tensors, mask = stream.cache(), stream.tensors(), stream.mask()
    outs = [stream_attention(*(x[:, :, :6] for x in tensors), cache, key_padding_mask=mask[:, :6])]
    outs.append(stream_attention(*(x[:, :, 6:] for x in tensors), cache))
    assert relative_error(torch.cat(outs, 2), stream.expected()) < 1e-10


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
@pytest.mark.parametrize("lead", [None, (0, 5)])
def test_the_scale_of_the_scores(scale, lead):
    stream = Stream(((8, 1), (20, 3)), 30, batch=2, kv_heads=3, lead=lead)
    cache, tensors, mask = stream.cache(), stream.tensors(), stream.mask()
    outs = []
    for i in range(0, 30, 6):
        part = None if mask is None else mask[:, i : i + 6]
        chunk = (x[:, :, i : i + 6] for x in tensors)
        outs.append(stream_attention(*chunk, cache, scale=scale, key_padding_mask=part))
    expected, _ = dense_attention(*tensors, *stream.pattern, is_causal=True, scale=scale, key_padding_mask=mask)
    assert relative_error(torch.cat(outs, 2), expected) < 1e-10


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_the_scale_of_a_step(scale):
    stream = Stream(((8, 1), (20, 3)), 30, kv_heads=3)
    cache, tensors = stream.cache(), stream.tensors()
    outs = []
    for i in range(30):
        outs.append(step(*(x[:, :, i : i + 1] for x in tensors), cache, scale)[0])
        cache.moved(1, on_device=False)
    expected, _ = dense_attention(*tensors, *stream.pattern, is_causal=True, scale=scale)
    assert relative_error(torch.cat(outs, 2), expected) < 1e-10


def test_under_autocast():
    stream = Stream(((8, 1), (20, 3)), 30, (11,), dtype=torch.bfloat16)
    tensors = stream.tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = read(stream, stream.cache(), [x.float() for x in tensors])
    assert torch.equal(out, read(stream, stream.cache(), tensors))


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return result


@pytest.mark.parametrize("start", [3072, 3071])
def test_no_mask_or_scores_of_chunk_times_cache(start):
    stream = Stream(((1024, 1), (8192, 2)), 4096, (start,), head_dim=8, dtype=torch.float32)
    cache, tensors = stream.cache(), stream.tensors()
    read(stream, cache, tensors, last=start)
    with _Largest() as largest:
        read(stream, cache, tensors, first=start)
    assert largest.numel < 2 * cache.keys.numel() < 1024 * start


def test_time_does_not_grow_with_what_was_read():
    """The same operations on tensors of the same sizes, at the same place in segments, however much was read."""
    stream = Stream(((16, 1), (64, 4)), 37, (20,))
    counts = []
    for far in (0, 64 * 10**9):
        cache = stream.cache()
        cache.load_state_dict({**cache.state_dict(), "position": torch.tensor(far)})
        with _Count() as count:
            read(stream, cache)
        counts.append(count.work)
    assert counts[0] == counts[1] and len(counts[0]) > 10


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.work: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.work += [(str(func), x.numel()) for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        return result


@pytest.mark.parametrize("by_products", [False, True])
def test_what_padded_rows_hold_does_not_reach_the_others(monkeypatch, by_products):
    if by_products:
        monkeypatch.setattr(rectangle, "_by_cpu_flash", rectangle._by_products)
    query, key, value = (torch.randn(2, 2, count, 4, dtype=torch.float64) for count in (3, 5, 5))
    padded = torch.tensor([[True, True, False, False, False], [True] * 5])
    expected = rectangle.rectangle_attention(query, key, value, 0.5, padded)
    for x in (key, value):
        x.masked_fill_(padded[:, None, :, None], torch.nan)
    got = rectangle.rectangle_attention(query, key, value, 0.5, padded)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert got[0].isfinite().all() and (got[0][1] == 0).all() and (got[1][1] == -torch.inf).all()


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
@pytest.mark.parametrize("backend", ["auto", "portable"])
def test_rows_against_rows_by_either_way(monkeypatch, backend, scale):
    """Portable streams are plain torch throughout; the kernel's scales have a sign too."""

    def refused(*_: Any) -> Any:
        raise AssertionError("a flash kernel")

    query, key, value = (
        torch.randn(2, heads, count, 4, dtype=torch.float64) for heads, count in ((4, 3), (2, 5), (2, 5))
    )
    if backend == "portable":
        monkeypatch.setattr(rectangle, "_by_cpu_flash", refused)
    out, lse = rectangle.rectangle_attention(query, key, value, scale, None, backend)
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * scale
    torch.testing.assert_close(out, scores.softmax(-1) @ value.repeat_interleave(2, 1))
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_a_portable_cache_reads_its_rows_in_plain_torch(monkeypatch):
    def refused(*_: Any) -> Any:
        raise AssertionError("a flash kernel")

    monkeypatch.setattr(rectangle, "_by_cpu_flash", refused)
    for lengths, rates, more in (((8, 16), (1, 2), {}), (None, 4, {"window": 3, "dilated_queries": False})):
        q, k, v = torch.randn(3, 1, 4, 20, 4, dtype=torch.float64)
        for backend in ("portable", "auto"):
            cache = DilatedCache(
                lengths, rates, batch_size=1, heads=4, head_dim=4, dtype=torch.float64, backend=backend, **more
            )
            stream_attention(q[:, :, :13], k[:, :, :13], v[:, :, :13], cache)
            rest = q[:, :, 13:], k[:, :, 13:], v[:, :, 13:], cache
            if backend == "auto":
                with pytest.raises(AssertionError, match="a flash kernel"):
                    stream_attention(*rest)
            else:
                whole = dilated_attention(q, k, v, lengths, rates, is_causal=True, **more)
                torch.testing.assert_close(stream_attention(*rest), whole[:, :, 13:])
