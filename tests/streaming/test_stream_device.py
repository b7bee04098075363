"""Streams on a CUDA device, the captured step among them. Skipped where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from band_streams import BandStream, band_streams
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns import relative_error
from streams import Stream, read, streams

from longnet import LongNetConfig, LongNetLM, dilated_attention, stream_attention

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:segment_lengths=.*to no head"),
    pytest.mark.filterwarnings("ignore:.*to no head:UserWarning"),
]


@given(stream=streams())
@settings(max_examples=60)
def test_any_split_gives_the_rows_of_one_call(stream):
    out = read(stream, stream.cache("cuda"), [x.cuda() for x in stream.tensors()])
    assert relative_error(out.cpu(), stream.expected()) < 1e-10


@given(stream=streams())
@settings(max_examples=30)
def test_steps_give_the_rows_of_one_call(stream):
    stream = replace(stream, cuts=tuple(range(stream.length)))
    out = read(stream, stream.cache("cuda"), [x.cuda() for x in stream.tensors()])
    assert relative_error(out.cpu(), stream.expected()) < 1e-10


def test_bf16_with_single_token_tails():
    stream = Stream(((512, 1), (2048, 4)), 5000, (1024, 3000, 4096, *range(4950, 5000)), kv_heads=8, head_dim=64)
    double = [x.cuda() for x in stream.tensors()]
    half = [x.bfloat16() for x in double]
    stream = replace(stream, dtype=torch.bfloat16)
    out = read(stream, stream.cache("cuda"), half)
    expected = dilated_attention(*(x.double() for x in half), *stream.pattern, is_causal=True)
    full = dilated_attention(*half, *stream.pattern, is_causal=True)
    assert relative_error(out, expected) < 1.5 * relative_error(full, expected)


def test_a_captured_step_is_repeated_over_segment_boundaries():
    stream = Stream(((16, 1), (48, 4), (64, 8)), 200, (37,), batch=2, kv_heads=4, group=2, dtype=torch.float32)
    tensors = [x.cuda() for x in stream.tensors()]
    cache = stream.cache("cuda")
    read(stream, cache, tensors, last=37)
    token = [x[:, :, 37:38].clone() for x in tensors]
    # Warm up on a copy, off the stream that is captured.
    stream_attention(*token, cache.clone())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = stream_attention(*token, cache)
    cache.moved(-1, on_device=False)  # capturing ran nothing
    outs = []
    for position in range(37, stream.length):
        for static, x in zip(token, tensors, strict=True):
            static.copy_(x[:, :, position : position + 1])
        graph.replay()
        cache.moved(1, on_device=False)
        outs.append(out.clone())
    assert cache.position == int(cache.position_tensor) == stream.length
    assert relative_error(torch.cat(outs, 2).cpu(), stream.expected()[:, :, 37:]) < 1e-5


@given(stream=band_streams(), by_steps=st.booleans())
@settings(max_examples=60)
def test_windows_strides_blocks_and_grids(stream, by_steps):
    """float32: kernels of chunks take no float64."""
    stream = replace(stream, dtype=torch.float32)
    first = stream.length // 2
    cuts = range(max(1, first), stream.length) if by_steps else stream.cuts
    stream = replace(stream, cuts=tuple(cuts))
    out = read(stream, stream.cache("cuda"), [x.cuda() for x in stream.tensors()])
    torch.testing.assert_close(out.cpu().double(), stream.expected(), rtol=1e-4, atol=1e-4)


STRIDED = BandStream(
    ((None, 4),), 3000, (1024, 2000, *range(2900, 3000)), batch=2, kv_heads=2, head_dim=64, window=256,
    dilated_queries=False, head_offsets="grouped", segment_offset=(0, -7), lead=(0, 7), capacity=3000, seed=1,
)  # fmt: skip
SHIFTED = replace(STRIDED, branches=((512, 1), (2048, 4)), dilated_queries=True, head_offsets="interleaved")


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("stream", [STRIDED, SHIFTED])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_the_whole_call(stream, group, dtype):
    stream = replace(stream, group=group, dtype=dtype)
    half, mask = [x.cuda() for x in stream.tensors()], stream.mask().cuda()
    out = read(stream, stream.cache("cuda"), half)
    options = {"segment_offset": stream.offset.cuda(), "key_padding_mask": mask, "is_causal": True, **stream.beyond}
    whole = dilated_attention(*half, *stream.pattern, **options)
    expected, real = stream.expected(), ~stream.mask()[:, None, :, None]
    errors = [relative_error(x.cpu() * real, expected * real) for x in (out, whole)]
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("branches", [((None, 4), (48, 2)), ((16, 1), (48, 4))])
@pytest.mark.parametrize("dilated_queries", [True, False])
def test_a_captured_step_is_repeated_over_the_ring_and_segments(group, branches, dilated_queries):
    stream = BandStream(
        branches, 200, (37,), batch=2, kv_heads=4, group=group, head_dim=32, dtype=torch.float32, window=24,
        dilated_queries=dilated_queries, segment_offset=(0, -9), lead=(0, 9), capacity=200,
    )  # fmt: skip
    tensors, cache = [x.cuda() for x in stream.tensors()], stream.cache("cuda")
    read(stream, cache, tensors, last=37)
    token = [x[:, :, 37:38].clone() for x in tensors]
    stream_attention(*token, cache.clone())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = stream_attention(*token, cache, return_lse=True)
    cache.moved(-1, on_device=False)  # capturing ran nothing
    outs, lses = [], []
    for position in range(37, stream.length):
        for static, x in zip(token, tensors, strict=True):
            static.copy_(x[:, :, position : position + 1])
        graph.replay()
        cache.moved(1, on_device=False)
        outs.append(out.clone())
        lses.append(lse.clone())
    assert cache.position == int(cache.position_tensor) == stream.length
    want = stream.expected_with_lse()
    for got, expected in zip((torch.cat(outs, 2), torch.cat(lses, 2)), want, strict=True):
        torch.testing.assert_close(got.cpu().double(), expected[:, :, 37:], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_a_cache_without_capacity_does_not_grow_while_a_graph_is_captured():
    stream = replace(STRIDED, length=1024, capacity=None, lead=None, segment_offset=0, dtype=torch.bfloat16)
    tensors, cache = [x.cuda() for x in stream.tensors()], stream.cache("cuda")
    stream_attention(*tensors, cache)
    token = [x[:, :, :1].clone() for x in tensors]
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(ValueError, match="capacity=None and room for 1024 tokens"), torch.cuda.graph(graph):
        stream_attention(*token, cache)
    assert cache.position == 1024
    stream_attention(*token, cache)


def test_a_captured_step_of_a_model_is_repeated_over_segment_boundaries():
    """xPos included: its angles follow the position on the device."""
    torch.manual_seed(0)
    model = LongNetLM(LongNetConfig.preset("nano"), device="cuda").eval()
    tokens = torch.randint(256, (2, 150), device="cuda")
    with torch.inference_mode():
        expected = model(tokens)
        cache = model.new_cache(2)
        model(tokens[:, :37], cache=cache)
        token = tokens[:, 37:38].clone()
        model(token, cache=cache.clone())
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(token, cache=cache)
        cache.moved(-1, on_device=False)
        for position in range(37, 150):
            token.copy_(tokens[:, position : position + 1])
            graph.replay()
            cache.moved(1, on_device=False)
            torch.testing.assert_close(logits[:, 0], expected[:, position], rtol=1e-3, atol=1e-3)
    assert cache.position == 150
