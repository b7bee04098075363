"""The kernels of a single token, in Triton's interpreter: the rows that one call over everything gives."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import interpreted
import pytest
import torch
from hypothesis import given, settings
from oracle import dense_attention
from patterns import relative_error
from streams import Stream, read, streams

from longnet import stream_attention
from longnet.attention.streaming import fused

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available() or importlib.util.find_spec("triton") is None,
        reason="needs triton, and no GPU: with one, kernels are compiled, and test_stream_device.py runs them",
    ),
    pytest.mark.filterwarnings("ignore:segment_lengths=.*to no head"),
]


@pytest.fixture(autouse=True, scope="module")
def small_parts():
    """Several parts of several tiles, as long segments have."""
    interpreted.hasten()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_ROWS", 4)
        patch.setattr(fused, "_MOST_SPLITS", 2)
        yield


def by_fused_step(query, key, value, cache, key_padding_mask):
    if query.shape[2] > 1:
        return stream_attention(query, key, value, cache, key_padding_mask=key_padding_mask)
    if key_padding_mask is not None:
        lead = cache.padding + key_padding_mask[:, 0]
        cache._set_padding(lead, int(lead.max()))
    out = fused.fused_step(query, key, value, cache, query.shape[-1] ** -0.5)
    cache.moved(1, on_device=False)
    assert cache.position == int(cache.position_tensor)
    return out


@given(stream=streams(longest=16))
@settings(max_examples=15)
def test_steps_after_a_chunk_give_the_rows_of_one_call(stream):
    first = min(stream.ends())
    stream = replace(stream, cuts=tuple(range(first, stream.length)))
    cache = stream.cache()
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    assert relative_error(read(stream, cache, attend=by_fused_step), stream.expected()) < 1e-10


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision_statistics_are_float32(dtype, allowed):
    stream = Stream(((8, 1), (24, 4)), 28, tuple(range(16, 28)), kv_heads=2, group=2, head_dim=16, dtype=dtype, seed=1)
    cache = stream.cache()
    read(stream, cache, last=16)
    out = read(stream, cache, first=16, attend=by_fused_step)
    assert out.dtype == dtype
    assert relative_error(out, stream.expected()[:, :, 16:]) < allowed


@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_any_scale(scale):
    stream = Stream(((4, 1), (16, 2)), 20, kv_heads=2)
    cache, tensors, outs = stream.cache(), stream.tensors(), []
    for i in range(stream.length):
        outs.append(fused.fused_step(*(x[:, :, i : i + 1] for x in tensors), cache, scale))
        cache.moved(1, on_device=False)
    expected, _ = dense_attention(*tensors, *stream.pattern, is_causal=True, scale=scale)
    assert relative_error(torch.cat(outs, 2), expected) < 1e-10


PERIODIC = Stream(((4, 1), (16, 2)), 22, tuple(range(22)))


@pytest.fixture(scope="module")
def near(small_parts):
    return read(PERIODIC, PERIODIC.cache(), attend=by_fused_step)


@pytest.mark.parametrize("start", [2**31 - 16, 10**12])
def test_any_position(start, near):
    """The same tokens give the same rows wherever a whole period ends."""
    start -= start % 16
    far = PERIODIC.cache()
    far.moved(start)
    assert torch.equal(near, read(PERIODIC, far, attend=by_fused_step))
    assert far.position == start + 22


def test_the_cpu_takes_the_other_path():
    assert not fused.fits(Stream(((16, 1),), 4).cache())
